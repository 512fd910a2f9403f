# SPDX-License-Identifier: Apache-2.0
"""Options that commands take from configuration files, and what they say of them."""

from __future__ import annotations

import hashlib
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

import chainmerge as api
from chainmerge.errors import ExitCode
from tests.support.cli import Ran, chainmerge
from tests.support.loopdev import mounted
from tests.support.operating import chain, kill_while_copying
from tests.support.qemu import content

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[2]


def written(directory: Path, text: str) -> str:
    """A configuration file, as CHAINMERGE_CONFIG names it."""
    file = directory / "config.toml"
    file.write_text(text)
    file.chmod(0o600)
    return str(file)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    place = tmp_path / "images"
    place.mkdir()
    return chain(place, ("base", "top"))


def states(images: list[Path]) -> list[str]:
    return [hashlib.sha256(image.read_bytes()).hexdigest() for image in images]


def planned(ran: Ran) -> bool:
    """Whether the plan deletes top."""
    assert ran.status == ExitCode.DONE, ran.err
    return bool(ran.json["delete"])


def test_a_merge_goes_by_its_section(images: list[Path], tmp_path: Path) -> None:
    file = written(tmp_path, "[merge]\ndelete = true\n")
    assert planned(chainmerge("plan", "--json", images[1], CHAINMERGE_CONFIG=file))
    assert not planned(chainmerge("plan", "--json", images[1]))
    assert chainmerge("merge", images[1], CHAINMERGE_CONFIG=file).status == 0
    assert not images[1].exists()


def test_the_command_line_has_the_last_word(images: list[Path], tmp_path: Path) -> None:
    file = written(tmp_path, '[merge]\ndelete = true\nverify = "metadata"\n')
    ran = chainmerge("plan", "--json", "--no-delete", images[1], CHAINMERGE_CONFIG=file)
    assert not planned(ran)
    shown = chainmerge("plan", "--no-delete", "--verify", "full", images[1], CHAINMERGE_CONFIG=file)
    command = f"chainmerge merge --no-delete --verify full {images[1]}"
    assert f"Do it: {command}" in shown.out
    without = chainmerge("--no-config", "plan", images[1], CHAINMERGE_CONFIG=file)
    assert f"Do it: chainmerge --no-config merge {images[1]}" in without.out
    assert not planned(
        chainmerge("--no-config", "plan", "--json", images[1], CHAINMERGE_CONFIG=file)
    )


def test_what_is_for_all_commands_is_for_those_that_can_be_given_it(
    images: list[Path], tmp_path: Path
) -> None:
    # Which libvirt has a domain is said with the domain; a file says it for scans.
    file = written(tmp_path, '[options]\nconnect = "test:///default"\n')
    ran = chainmerge("bitmaps", "list", images[1], CHAINMERGE_CONFIG=file)
    assert ran.status == 0, ran.err
    socket = ("--qmp", tmp_path / "missing", "--device", "disk")
    ran = chainmerge("live", "status", "--json", *socket, CHAINMERGE_CONFIG=file)
    assert ran.json["code"] == "vm-unreachable"
    (value,) = chainmerge("config", "show", "--json", CHAINMERGE_CONFIG=file).json["values"]
    assert not value["overridden"]


def test_a_file_is_in_nobodys_way_where_its_word_would_be_a_contradiction(
    images: list[Path], tmp_path: Path
) -> None:
    text = f'[repair]\nbackup = "{tmp_path}"\n[options]\ndirection = "commit"\n'
    file = written(tmp_path, text)
    undone = chainmerge("repair", "--json", "--undo", images[1], CHAINMERGE_CONFIG=file)
    assert undone.json["code"] == "repair-backup-unusable"
    flat = chainmerge("flatten", "--dry-run", "--json", images[1], CHAINMERGE_CONFIG=file)
    assert flat.json["directions"]["chosen"] == "pull"
    typed = chainmerge("flatten", "--direction", "commit", images[1], CHAINMERGE_CONFIG=file)
    assert typed.status == ExitCode.USAGE


@pytest.mark.parametrize("value", ["nan", "-inf", "1e999"])
def test_what_is_no_number_is_wrong_wherever_it_is_looked_at(
    images: list[Path], tmp_path: Path, value: str
) -> None:
    file = written(tmp_path, f"[options]\nlock-wait = {value}\n")
    checked = chainmerge("config", "check", "--json", CHAINMERGE_CONFIG=file)
    assert (checked.status, len(checked.json["problems"])) == (ExitCode.USAGE, 1)
    shown = chainmerge("config", "show", "--json", CHAINMERGE_CONFIG=file)
    assert (shown.status, shown.json["values"][0]["value"]) == (ExitCode.DONE, value)
    ran = chainmerge("plan", "--json", images[1], CHAINMERGE_CONFIG=file)
    assert (ran.status, ran.json["code"]) == (ExitCode.USAGE, "configuration-invalid")


@pytest.fixture
def etc(tmp_path: Path) -> Iterator[Path]:
    """A copy of the machine's /etc in its place."""
    copy = tmp_path / "etc"
    shutil.copytree("/etc", copy, symlinks=True, ignore_dangling_symlinks=True)
    (copy / "chainmerge").mkdir(exist_ok=True)
    with mounted("--bind", copy, "/etc"):
        yield Path("/etc/chainmerge")


def test_which_file_goes_over_which(etc: Path, tmp_path: Path) -> None:
    written(etc, "[scan]\nold-days = 1\nlength-info = 1\n[options]\nlock-wait = 1\n")
    users = tmp_path / "user" / "chainmerge"
    users.mkdir(parents=True)
    user = written(users, "[scan]\nold-days = 2\nlength-warning = 2\n[merge]\nlock-wait = 2\n")
    own = written(tmp_path, "[scan]\nold-days = 3\n[options]\nlock-wait = 3\nlength-critical = 3\n")
    places = {"XDG_CONFIG_HOME": str(tmp_path / "user"), "CHAINMERGE_CONFIG": own}
    system = "/etc/chainmerge/config.toml"

    def found(*command: str) -> dict[str, tuple[object, str]]:
        ran = chainmerge("config", "show", "--json", *command, **places)
        return {
            one["option"]: (one["value"], one["file"])
            for one in ran.json["values"]
            if one["file"] and not one["overridden"]
        }

    assert found("scan") == {
        "old-days": (3, own),
        "length-info": (1, system),
        "length-warning": (2, user),
        "length-critical": (3, own),
    }
    # A later file for all commands goes over an earlier one for this command.
    assert found("live", "merge") == found("plan") == {"lock-wait": (3, own)}
    assert len(found()) == 5
    shown = chainmerge("config", "show", **places).out
    assert shown.count("overridden") == 4
    scopes = [
        one["scope"] for one in chainmerge("config", "check", "--json", **places).json["files"]
    ]
    assert scopes == ["system", "user", "environment"]


@pytest.mark.parametrize(
    ("text", "said", "advice"),
    [
        ("[merge]\nverfy = 'full'\n", "[merge] has no option 'verfy'", "did you mean `verify`?"),
        ("[merge]\nlock_wait = 3\n", "no option 'lock_wait'", "`lock-wait`"),
        ("[merge]\n--delete = true\n", "no option '--delete'", "`delete`"),
        ("[info]\nverify = 'full'\n", "[info] has no option 'verify'", "[merge]"),
        ("[merg]\n", "there is no section [merg]", "`[merge]`"),
        ("[plan]\nverify = 'full'\n", "there is no section [plan]", "[merge]"),
        ("[live]\nverify = 'full'\n", "there is no section [live.verify]", ""),
        ("delete = true\n", "there is no section [delete]", ""),
        ("merge = 3\n", "merge is not a section", "[merge]"),
        ("[merge]\nyes = true\n", "cannot set 'yes'", "--yes"),
        ("[options]\ndrop-bitmaps = true\n", "cannot set 'drop-bitmaps'", "--drop-bitmaps"),
        ("[merge]\nverify = 'hardly'\n", "verify in [merge] cannot be 'hardly'", "'full'"),
        ("[merge]\ndelete = 'yes'\n", "delete in [merge] cannot be 'yes'", "true or false"),
        ("[merge]\nverify = true\n", "cannot be True", "a text or a number"),
        ("[merge]\nsearch = '/srv'\n", "cannot be '/srv'", "a list of texts"),
        ("[merge]\nsearch = ['srv']\n", "cannot be ['srv']", "not an absolute path"),
        ("[merge]\nformat = ['a=raw']\n", "cannot be ['a=raw']", "not an absolute path"),
        ("[merge]\nkey-file = ['key']\n", "cannot be ['key']", "not an absolute path"),
        ("[merge]\nbandwidth = 'much'\n", "cannot be 'much'", "not a size"),
        ("[options]\nlock-wait = -1\n", "cannot be -1", "range"),
        ("[merge\n", "it is not TOML", ""),
        ("[merge]\nverify = '\udcff'\n", "it is not TOML", ""),
    ],
)
def test_what_means_nothing_stops_everything(
    images: list[Path], tmp_path: Path, text: str, said: str, advice: str
) -> None:
    file = written(tmp_path, "")
    Path(file).write_bytes(text.encode("utf-8", "surrogateescape"))
    before = states(images)
    ran = chainmerge("merge", "--json", images[1], CHAINMERGE_CONFIG=file)
    assert (ran.status, ran.json["code"]) == (ExitCode.USAGE, "configuration-invalid")
    assert said in ran.json["message"]
    assert file in ran.json["message"]
    assert advice in ran.json["hint"]
    assert states(images) == before
    checked = chainmerge("config", "check", "--json", CHAINMERGE_CONFIG=file)
    assert checked.status == ExitCode.USAGE
    (problem,) = checked.json["problems"]
    assert said in problem["problem"]


def test_a_check_finds_everything(tmp_path: Path) -> None:
    file = written(tmp_path, "[scan]\nold-days = 0\nnew-days = 1\n[live.merge]\non-stall = 'cry'\n")
    ran = chainmerge("config", "check", file)
    assert ran.status == ExitCode.USAGE
    assert "3 problems found" in ran.out
    # A merge of closed images has to do with one of them: the word that does not exist.
    Path(file).write_text("[live.merge]\non-stall = 'cry'\n")
    assert chainmerge("info", tmp_path, CHAINMERGE_CONFIG=file).status == 0
    assert chainmerge("live", "plan", CHAINMERGE_CONFIG=file).status == ExitCode.USAGE


def test_what_helps_does_without(tmp_path: Path) -> None:
    file = written(tmp_path, "[merge]\nverfy = 'full'\n")
    for words in (["merge", "--help"], ["explain", "usage"], ["--version"], ["status", tmp_path]):
        assert chainmerge(*words, CHAINMERGE_CONFIG=file).status == 0
    assert chainmerge("config", "check", CHAINMERGE_CONFIG="/nonexistent").status == 3


def test_functions_do_not_read_files(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAINMERGE_CONFIG", written(tmp_path, "[merge]\ndelete = true\n"))
    assert api.plan(images[1]).delete == ()


@pytest.mark.parametrize("delete", [True, False])
def test_what_was_decided_is_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delete: bool
) -> None:
    """Whatever files say by then: the command that finishes a merge takes nothing from them."""
    base, _, top, active = chain(tmp_path, ("base", "snap0", "snap1", "active"), mib=8)
    expected = content(active)
    word = str(delete).lower()
    file = written(tmp_path, f'[merge]\ndelete = {word}\nverify = "metadata"\n')
    monkeypatch.setenv("CHAINMERGE_CONFIG", file)
    kill_while_copying(base, "--base", str(base), str(top))
    written(tmp_path, f'[merge]\ndelete = {str(not delete).lower()}\ndirection = "pull"\n')
    (merge,) = chainmerge("status", "--json", base).json["merges"]
    program, *words = shlex.split(merge["command"])
    assert (program, words[:2]) == ("chainmerge", ["--no-config", "merge"])
    assert ("--delete" in words) is delete
    assert words[words.index("--verify") + 1] == "metadata"
    assert chainmerge(*words).status == 0
    assert top.exists() is not delete
    assert content(active) == expected


def test_the_example_is_one(tmp_path: Path) -> None:
    example = (ROOT / "contrib" / "config.toml").read_text()
    lines = [line.removeprefix("#") if "=" in line else line for line in example.splitlines()]
    file = written(tmp_path, "\n".join(lines))
    assert chainmerge("config", "check", file).status == 0
    shown = chainmerge("config", "show", "--json", CHAINMERGE_CONFIG=file).json["values"]
    assert len(shown) == sum(" = " in line for line in lines) > 15
