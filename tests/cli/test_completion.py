# SPDX-License-Identifier: Apache-2.0
"""Completion of words, as the shells ask for it."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import click
import libvirt
import pytest

from chainmerge.catalogue import known_subjects
from chainmerge.cli import main
from chainmerge.errors import ExitCode
from tests.live.test_domains import IDLE
from tests.support import qemu
from tests.support.cli import chainmerge, environment
from tests.support.fake_lvm import FakeLvm
from tests.support.images import MIB
from tests.support.libvirtd import libvirtd
from tests.support.loopdev import loop_device

if TYPE_CHECKING:
    from pathlib import Path

COMMANDS: Final = main.cli.list_commands(click.Context(main.cli))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A directory with images of all kinds of names, and with what is no image."""
    for name in ("disk.qcow2", "disk.snap1", "my disk.qcow2"):
        qemu.create(tmp_path / name, MIB)
    for name in ("daily", "two words", "dis,tinct"):
        qemu.qemu_img("bitmap", "--add", tmp_path / "disk.qcow2", name)
    (tmp_path / "disk.img").touch()
    (tmp_path / "disk.txt").touch()
    (tmp_path / "disks").mkdir()
    return tmp_path


def asked(shell: str, *words: str, where: Path | None = None, **more: str) -> list[str]:
    """What a shell is told of the last word, without what kind each candidate is."""
    fish = shell == "fish"
    told = subprocess.run(
        [sys.executable, "-m", "chainmerge"],
        capture_output=True,
        check=True,
        cwd=where,
        env=environment(
            _CHAINMERGE_COMPLETE=f"{shell}_complete",
            COMP_WORDS=" ".join(("chainmerge", *words)),
            COMP_CWORD=words[-1] if fish else str(len(words)),
            **more,
        ),
    )
    assert told.stderr == b""
    lines = told.stdout.decode().rstrip("\n").splitlines()
    if shell == "zsh":
        return lines[1::3]
    return [line.partition(",")[2].partition("\t")[0] for line in lines]


def in_bash(*words: str, where: Path, program: Path) -> list[str]:
    """What the last word becomes in bash, as it would stand in the line."""
    typed = ("chainmerge", *words)
    line = " ".join(typed)
    script = (
        'source <(chainmerge completion bash); compopt() { echo "compopt $*" >&2; };'
        f"COMP_WORDS=({' '.join(map(shlex.quote, typed))}); COMP_LINE={shlex.quote(line)}; "
        f"COMP_POINT={len(line)}; COMP_CWORD={len(words)}; _chainmerge_completion chainmerge; "
        "printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    ran = subprocess.run(
        ["bash", "--norc", "-c", script],
        capture_output=True,
        check=True,
        cwd=where,
        env=environment(PATH=f"{program}:{os.environ['PATH']}"),
    )
    return [line for line in ran.stdout.decode().splitlines() if line]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands(shell: str) -> None:
    assert asked(shell, "mer") == ["merge"]
    assert asked(shell, "bitmaps", "re") == ["remove", "repair"]
    assert asked(shell, "frobnicate", "x") == []


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_an_empty_word_may_become_any_command(shell: str) -> None:
    assert asked(shell, "") == COMMANDS
    assert {"plan", "merge", "resume", "status"} <= set(asked(shell, "live", ""))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_options_and_their_values(shell: str) -> None:
    assert asked(shell, "merge", "--dry") == ["--dry-run"]
    assert asked(shell, "merge", "--verify", "f") == ["full"]
    assert "--version" in asked(shell, "--v")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_images(images: Path, shell: str) -> None:
    slash = "" if shell == "bash" else "/"
    here = ["disk.img", "disk.qcow2", "disk.snap1", f"disks{slash}"]
    assert asked(shell, "merge", "d", where=images) == here
    assert asked(shell, "merge", "--base", f"{images}/disk.q") == [f"{images}/disk.qcow2"]
    assert asked(shell, "merge", "no/such/place") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_bitmaps_of_the_image(images: Path, shell: str) -> None:
    image = str(images / "disk.qcow2")
    assert asked(shell, "bitmaps", "remove", image, "d") == ["daily", "dis,tinct"]
    assert asked(shell, "bitmaps", "clear", image, "daily", "d") == ["dis,tinct"]
    assert asked(shell, "bitmaps", "merge", image, "da") == ["daily"]
    assert asked(shell, "bitmaps", "merge", image, "daily", "tw") == ["two words"]
    other = str(images / "disk.snap1")
    assert asked(shell, "bitmaps", "merge", other, "x", "--from", image, "da") == ["daily"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_value_of_an_option_in_the_same_word(images: Path, shell: str) -> None:
    assert asked(shell, "merge", "--base=disk.q", where=images) == ["disk.qcow2"]
    assert asked(shell, "merge", "--verify=f") == ["full"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_an_image_with_its_format(images: Path, shell: str) -> None:
    def after_format(word: str) -> list[str]:
        return asked(shell, "merge", "--format", word, where=images)

    assert after_format("disk.") == ["disk.img=", "disk.qcow2=", "disk.snap1="]
    assert after_format("disks") == ["disks/"]
    assert after_format("disk.img=q") == ["disk.img=qcow2", "disk.img=qed"]
    assert asked(shell, "merge", "--format=disk.img=ra", where=images) == ["disk.img=raw"]


def test_a_key_file_for_an_image(images: Path) -> None:
    assert asked("zsh", "merge", "--key-file", "disk.t", where=images) == ["disk.txt"]
    said = asked("zsh", "merge", "--key-file", "disk.qcow2=disk.t", where=images)
    assert said == ["disk.qcow2=disk.txt"]
    assert asked("zsh", "merge", "--key-file", "disk.qcow2=no/such", where=images) == []


def test_what_bash_has_split_off_is_not_answered_again(images: Path) -> None:
    (images / "a:b=c.qcow2").touch()

    def left(word: str, split_off: str) -> list[str]:
        return asked("bash", "merge", word, where=images, COMP_SPLIT_OFF=split_off)

    assert left("a:b", "a:") == ["b=c.qcow2"]
    assert left("a:b=", "a:b=") == ["c.qcow2"]
    assert left("--base=a:", "--base=a:") == ["b=c.qcow2"]
    assert left(r"a\:b=", r"a\:b=") == ["c.qcow2"]


@pytest.mark.parametrize("suffix", ["vmdk", "vhdx", "vdi", "qcow"])
def test_images_of_other_formats(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"disk.{suffix}").touch()
    assert asked("bash", "info", "d", where=tmp_path) == [f"disk.{suffix}"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells(shell: str) -> None:
    assert asked(shell, "completion", "f") == ["fish"]


def test_volumes_and_their_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lvm = FakeLvm(tmp_path / "lvm")
    lvm.install(monkeypatch)
    with loop_device(tmp_path / "volume", 8 * MIB) as device:
        lvm.add_group("guests-of-ours", 4, [])
        lvm.add_volume("guests-of-ours", "web", device)
        (tmp_path / "guesses").mkdir()
        with lvm.names_in_dev():
            assert asked("bash", "merge", "/dev/guests-of-ours/w") == ["/dev/guests-of-ours/web"]
            assert asked("bash", "scan", "gue", where=tmp_path) == ["guesses", "guests-of-ours"]
            # What a merge is for is not a group.
            assert asked("bash", "merge", "gue", where=tmp_path) == ["guesses"]


def test_there_may_be_no_lvm(images: Path) -> None:
    assert asked("bash", "scan", "disk.q", where=images, PATH="") == ["disk.qcow2"]


def test_domains_and_their_disks(images: Path, tmp_path: Path) -> None:
    with libvirtd(tmp_path / "libvirt") as uri:
        connection = libvirt.open(uri)
        connection.defineXML(IDLE.format(image=images / "disk.qcow2"))

        def after(*words: str) -> list[str]:
            return asked("bash", "live", "merge", "--connect", uri, *words)

        assert after("--domain", "i") == ["idle"]
        assert after("--domain", "x") == []
        assert after("--domain", "idle", "--disk", "") == ["vda"]
        assert after("--domain", "other", "--disk", "") == []
        assert asked("bash", "bitmaps", "list", "--connect", uri, "--domain=i") == ["idle"]
        connection.close()


def test_there_may_be_no_libvirt(tmp_path: Path) -> None:
    uri = f"qemu+unix:///system?socket={tmp_path}/missing"
    assert asked("bash", "live", "merge", "--connect", uri, "--domain", "i") == []
    assert asked("bash", "live", "merge", "--connect", uri, "--disk", "v") == []


def test_a_libvirt_that_does_not_answer_is_not_waited_for_long(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "socket"))
        deaf.listen()
        uri = f"qemu+unix:///system?socket={tmp_path}/socket"
        ran = chainmerge(
            _CHAINMERGE_COMPLETE="bash_complete",
            COMP_WORDS=f"chainmerge live merge --connect {uri} --domain i",
            COMP_CWORD="6",
        )
    assert (ran.status, ran.out, ran.err) == (ExitCode.FAILED, "", "")


@pytest.mark.parametrize("name", ["disk.snap1", "disk.img", "disk.txt", "disks", "missing"])
def test_there_may_be_no_bitmaps(images: Path, name: str) -> None:
    assert asked("bash", "bitmaps", "remove", str(images / name), "d") == []


def test_codes_of_errors() -> None:
    found = asked("bash", "explain", "base-")
    assert set(found) == {code for code in known_subjects() if code.startswith("base-")}


def test_names_of_commands_are_completed_without_what_merges() -> None:
    script = (
        "import sys; from chainmerge.cli.main import run; run([]);"
        "print(sorted({'numpy', 'msgspec', 'rich', 'asyncio'} & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        check=True,
        env=environment(
            _CHAINMERGE_COMPLETE="bash_complete", COMP_WORDS="chainmerge mer", COMP_CWORD="1"
        ),
    ).stdout
    assert out.decode().splitlines() == ["plain,merge", "[]"]


def test_a_shell_that_asks_wrongly_is_told_nothing() -> None:
    ran = chainmerge(_CHAINMERGE_COMPLETE="bash_complete")
    assert (ran.status, ran.out, ran.err) == (ExitCode.FAILED, "", "")


def test_bash(images: Path, program: Path) -> None:
    def bash(*words: str) -> list[str]:
        return in_bash(*words, where=images, program=program)

    assert bash("fla") == ["flatten"]
    assert bash("merge", "disk") == ["disk.img", "disk.qcow2", "disk.snap1", "disks"]
    # Bash puts what readline needs around names of files, and nothing around others.
    assert bash("merge", "my") == ["my disk.qcow2"]
    assert bash("bitmaps", "remove", "disk.qcow2", "") == ["daily", r"two\ words", r"dis\,tinct"]
    assert "image-locked" in bash("explain", "image")
    # Another image than the one without the comma.
    (images / "my disk.qcow2").rename(images / "disk.qcow2,")
    assert bash("merge", "disk.q") == ["disk.qcow2", "disk.qcow2,"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_reads_its_script(shell: str) -> None:
    ran = chainmerge("completion", shell)
    assert (ran.status, ran.err) == (ExitCode.DONE, "")
    assert f"{shell}_complete" in ran.out
    subprocess.run([shell, "-n"], input=ran.out.encode(), check=True)


def test_another_shell_is_wrong_usage() -> None:
    ran = chainmerge("completion", "csh")
    assert ran.status == ExitCode.USAGE
    assert "'zsh'" in ran.err
