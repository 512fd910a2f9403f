# SPDX-License-Identifier: Apache-2.0
"""Completion of words, as the shells ask for it; and bash, zsh and fish themselves."""

from __future__ import annotations

import os
import pty
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import click
import pytest

from chainmerge.catalogue import known_subjects
from chainmerge.cli import main
from chainmerge.errors import ExitCode
from tests.support import qemu
from tests.support.cli import chainmerge, environment
from tests.support.images import MIB

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
    script = (
        'source <(chainmerge completion bash); compopt() { echo "compopt $*" >&2; };'
        f"COMP_WORDS=({' '.join(map(shlex.quote, ('chainmerge', *words)))}); "
        f"COMP_CWORD={len(words)}; _chainmerge_completion chainmerge; "
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


@pytest.fixture
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the program ``chainmerge``, as an installation has it."""
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "chainmerge"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m chainmerge "$@"\n')
    script.chmod(0o755)
    return folder


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


@pytest.mark.parametrize(
    ("typed", "becomes"),
    [
        ("fla", "flatten "),
        ("merge --dry", "merge --dry-run "),
        ("merge my", r"merge my\ disk.qcow2 "),
        # There may be more below it.
        ("merge disks", "merge disks/"),
        ("bitmaps remove disk.qcow2 tw", r"bitmaps remove disk.qcow2 two\ words "),
        ("explain image-lo", "explain image-locked "),
    ],
)
def test_a_key_in_bash(images: Path, program: Path, typed: str, becomes: str) -> None:
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(images)
        # TERM=dumb: readline shows what it inserts and nothing else.
        more = {"PATH": f"{program}:{os.environ['PATH']}", "TERM": "dumb", "PS1": "ready:"}
        os.execvpe("bash", ["bash", "--norc", "-i"], environment(**more))
    try:
        _read_until(terminal, "ready:")
        os.write(terminal, b"source <(chainmerge completion bash); bind 'set bell-style none'\n")
        _read_until(terminal, "ready:")
        os.write(terminal, f"chainmerge {typed}\t".encode())
        assert _read_until(terminal, becomes).endswith(f"chainmerge {becomes}")
    finally:
        os.close(terminal)
        os.waitpid(child, 0)


def _read_until(terminal: int, expected: str) -> str:
    """What a terminal shows until it shows that; a test that waits in vain runs out of time."""
    shown = ""
    while not shown.endswith(expected):
        shown += os.read(terminal, 1).decode(errors="replace")
    return shown


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
