# SPDX-License-Identifier: Apache-2.0
"""What is said to somebody who has typed what does not exist."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import click
import pytest

from chainmerge.cli import main
from chainmerge.cli.usage import OPTIONS_OF_OTHERS, WORDS_OF_OTHERS
from chainmerge.errors import ExitCode
from tests.support.cli import environment

if TYPE_CHECKING:
    from collections.abc import Sequence


def advice(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    """What is wrong, and what to do about it."""
    assert main.run(arguments) == ExitCode.USAGE
    said = capsys.readouterr()
    assert said.out == ""
    wrong, what_to_do, _ = said.err.splitlines()
    return wrong.removeprefix("chainmerge: "), what_to_do.removeprefix("  what to do: ")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("commit", "`chainmerge merge TOP`"),
        ("Commit", "`chainmerge merge TOP`"),
        ("blockcommit", "`chainmerge live merge TOP`"),
        ("rebase", "`chainmerge relink IMAGE --backing NEW`"),
        ("ls", "`chainmerge list DIR`"),
        ("pull", "`chainmerge merge --direction pull TOP`"),
        ("stream", "`chainmerge flatten TOP`"),
        ("convert", "`chainmerge flatten TOP`"),
        ("mrege", "did you mean `chainmerge merge`?"),
        ("Bitmap", "did you mean `chainmerge bitmaps`?"),
        ("frobnicate", "see `chainmerge --help`"),
    ],
)
def test_a_command_that_does_not_exist(
    capsys: pytest.CaptureFixture[str], typed: str, meant: str
) -> None:
    wrong, what_to_do = advice(capsys, typed, "disk.qcow2")
    assert wrong == f"no such command {typed!r}"
    assert meant in what_to_do


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (("bitmaps", "create"), "`chainmerge bitmaps add IMAGE NAME`"),
        (("bitmaps", "lsit"), "did you mean `chainmerge bitmaps list`?"),
        (("live", "commit"), "`chainmerge live merge TOP`"),
        (("live", "frobnicate"), "see `chainmerge live --help`"),
    ],
)
def test_a_command_of_a_group_that_does_not_exist(
    capsys: pytest.CaptureFixture[str], typed: tuple[str, str], meant: str
) -> None:
    wrong, what_to_do = advice(capsys, *typed)
    assert wrong == f"no such command {typed[1]!r}"
    assert meant in what_to_do


@pytest.mark.parametrize(
    ("typed", "option", "meant"),
    [
        (("merge", "--top", "x"), "--top", "`chainmerge merge TOP --base BASE`"),
        (("merge", "--yes", "x"), "--yes", "does not ask"),
        (("plan", "-y", "x"), "-y", "does not ask"),
        (("plan", "-n", "x"), "-n", "`chainmerge plan TOP`"),
        (("plan", "--output", "json", "x"), "--output", "did you mean `--json`?"),
        (("merge", "--delte", "x"), "--delte", "did you mean `--delete`"),
        (("merge", "--debug", "x"), "--debug", "`chainmerge --debug merge`"),
        (("live", "plan", "--debug", "x"), "--debug", "`chainmerge --debug live plan`"),
        (("-q", "merge", "x"), "-q", "options go after the command"),
        (("merge", "--frobnicate", "x"), "--frobnicate", "see `chainmerge merge --help`"),
    ],
)
def test_an_option_that_does_not_exist(
    capsys: pytest.CaptureFixture[str], typed: Sequence[str], option: str, meant: str
) -> None:
    wrong, what_to_do = advice(capsys, *typed)
    assert wrong == f"no such option {option!r}"
    assert meant in what_to_do


@pytest.mark.parametrize(
    "typed",
    [
        ("commit", "--json", "x"),
        ("--json", "commit"),
        ("merge", "--json"),
        ("merge", "x", "--size-limit", "much", "--json"),
        ("merge", "x", "--frobnicate", "--json"),
        ("bitmaps", "remove", "--json", "x"),
    ],
)
def test_wrong_usage_is_json_where_reports_are(
    capsys: pytest.CaptureFixture[str], typed: Sequence[str]
) -> None:
    assert main.run(typed) == ExitCode.USAGE
    said = capsys.readouterr()
    assert said.err == ""
    (line,) = said.out.splitlines()
    error = json.loads(line)
    assert (error["event"], error["code"]) == ("error", "usage")
    assert error["message"]
    assert error["hint"]


def test_what_comes_after_two_dashes_is_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    wrong, _ = advice(capsys, "check", "--", "x", "--json")
    assert "--json" in wrong


def test_what_exists_has_no_other_meaning() -> None:
    """A word of the table that becomes a command would never be explained again."""
    for path, other in WORDS_OF_OTHERS.items():
        group: click.Command | None = main.cli
        for name in path.split()[1:]:
            assert isinstance(group, click.Group)
            group = group.get_command(click.Context(group), name)
        assert isinstance(group, click.Group)
        assert not set(other) & set(group.list_commands(click.Context(group)))
    everywhere = {"--json", "--help"}
    assert not everywhere & set(OPTIONS_OF_OTHERS)


def test_a_slip_is_answered_without_loading_what_merges() -> None:
    script = (
        "import sys; from chainmerge.cli.main import run; run(['commit']);"
        "print(sorted({'numpy', 'rich', 'asyncio'} & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, env=environment()
    ).stdout
    assert out.decode() == "[]\n"
