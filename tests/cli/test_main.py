# SPDX-License-Identifier: Apache-2.0
"""How commands start and end, whatever they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import click
import pytest

from chainmerge.__about__ import __version__
from chainmerge.cli import main
from chainmerge.cli.commands import Command
from chainmerge.cli.options import json_option
from chainmerge.errors import ExitCode, Failed, Interrupted, Misuse, OutcomeUnknown, Refused
from tests.support.cli import COMMAND, chainmerge, environment
from tests.support.images import MIB
from tests.support.qemu import assert_clean, content, create, qemu_io

if TYPE_CHECKING:
    from pathlib import Path

HOSTILE_NAME = os.fsdecode(b"\x1b]0;owned\x07[bold]\xe9\n.qcow2")


def test_starting_is_cheap() -> None:
    script = (
        "import sys; from chainmerge.cli.main import run; run(['--version']);"
        "print(sorted({'numpy', 'qemu', 'msgspec', 'asyncio'} & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, env=environment()
    ).stdout
    assert out.decode().splitlines() == [f"chainmerge {__version__}", "[]"]


_MODULES_OF_OURS: Final = 229
"""What a merge of two files loads at most, its line in the history included; each takes 0.3 ms."""


def test_a_merge_loads_only_what_it_uses(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2", MIB)
    top = create(tmp_path / "top.qcow2", backing=base)
    qemu_io(top, "write -P 1 0 64k")
    script = (
        "import sys; from chainmerge.cli.main import run; status = run(sys.argv[1:]);"
        "print(*sys.modules, file=sys.stderr); sys.exit(status)"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, "merge", str(top)],
        capture_output=True,
        check=True,
        env=environment(),
    ).stderr
    loaded = set(out.decode().splitlines()[-1].split())
    needless = {
        "asyncio", "chainmerge.live", "dataclasses", "libvirt", "numpy.ma", "numpy.typing", "qemu",
        "rich", "rich_click", "subprocess", "tempfile", "traceback", "tomllib",
        "chainmerge.cli.configuration",
    }  # fmt: skip
    assert sorted(loaded & needless) == []
    assert len([name for name in loaded if name.startswith("chainmerge")]) <= _MODULES_OF_OURS


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["merge", "--help"], ["--version"]])
def test_asking_for_help_succeeds(arguments: list[str]) -> None:
    assert chainmerge(*arguments).status == 0


@pytest.mark.parametrize("name", sorted(main._COMMANDS))
def test_every_command_has_help(name: str) -> None:
    ran = chainmerge(name, "--help")
    assert ran.status == 0
    assert "Usage:" in ran.out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["bitmaps"],
        ["frobnicate"],
        ["merge"],
        ["merge", "--frobnicate", "x"],
        ["merge", "x", "--size-limit", "much"],
        ["merge", "x", "--verify", "hardly"],
        ["check", "x", "y"],
        ["plan", "x", "--format", "raw"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    ran = chainmerge(*arguments)
    assert ran.status == ExitCode.USAGE
    assert ran.out == ""
    assert "Traceback" not in ran.err


def test_exit_statuses_are_what_scripts_rely_on() -> None:
    assert [(code.name, code.value) for code in ExitCode] == [
        ("DONE", 0),
        ("FAILED", 1),
        ("USAGE", 2),
        ("REFUSED", 3),
        ("UNKNOWN", 4),
        ("UNFINISHED", 5),
        ("INTERRUPTED", 130),
    ]
    kinds = (Failed, Misuse, Refused, OutcomeUnknown, Interrupted)
    assert [kind.exit_code for kind in kinds] == [1, 2, 3, 4, 130]


def test_a_name_cannot_drive_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / HOSTILE_NAME
    path.write_bytes(b"no image")
    for arguments in (["info", str(path)], ["info", str(path), str(path)], ["plan", str(path)]):
        ran = chainmerge(*arguments)
        assert ran.status in {ExitCode.USAGE, ExitCode.REFUSED}
        assert all(c.isprintable() or c == "\n" for c in ran.out + ran.err)
        assert r"\x1b]0;owned\x07[bold]\xe9\n.qcow2" in ran.err


def test_errors_are_json_where_reports_are(tmp_path: Path) -> None:
    ran = chainmerge("info", "--json", tmp_path / HOSTILE_NAME)
    assert ran.status == ExitCode.REFUSED
    assert ran.err == ""
    error = json.loads(ran.out)
    assert error["event"] == "error"
    assert error["code"] == "image-missing"
    assert HOSTILE_NAME in error["facts"]["image"]


def test_a_reader_that_leaves_is_no_failure() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [*COMMAND, "explain"], stdout=writer, stderr=subprocess.PIPE, check=False, env=environment()
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, b"")


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_report_that_cannot_be_written_is_a_failure(more: list[str]) -> None:
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        result = subprocess.run(
            [*COMMAND, "explain", *more],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
            env=environment(),
        )
    assert result.returncode == ExitCode.FAILED
    assert b"No space left on device" in result.stderr
    assert b"Traceback" not in result.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_failure(tmp_path: Path, closed: str) -> None:
    base = create(tmp_path / "base", 8 << 20)
    top = create(tmp_path / "top", backing=base.name)
    qemu_io(top, "write -P 5 0 1M")
    expected = content(top)
    script = f'exec "$@" {closed}'
    result = subprocess.run(
        ["sh", "-c", script, "sh", *COMMAND, "merge", str(top)],
        capture_output=True,
        check=False,
        env=environment(),
    )
    assert result.returncode == ExitCode.DONE, result
    assert content(base) == expected
    assert_clean(base)


@pytest.mark.parametrize("terminal", ["dumb", "xterm"])
def test_a_file_has_no_edge_to_wrap_at(tmp_path: Path, terminal: str) -> None:
    image = create(tmp_path / ("long" * 30), MIB)
    ran = chainmerge("info", image, TERM=terminal)
    assert len(str(image)) > 80
    assert any(str(image) in line for line in ran.out.splitlines())


def test_output_that_is_not_unicode_is_drawn_plainly() -> None:
    script = (
        "import sys; from chainmerge.cli.streams import prepare_streams; prepare_streams();"
        "print('◉ ├─● é \\udce9')"
    )
    out = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        check=True,
        env=environment(PYTHONIOENCODING="ascii"),
    ).stdout
    assert out.decode("ascii") == "* |-o \\xe9 \\udce9\n"


@click.command(cls=Command)
@json_option
def buggy(**_: object) -> None:
    raise ZeroDivisionError("by \x1b zero")


def test_a_bug_is_one_line_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert buggy.main([], standalone_mode=False) == ExitCode.FAILED
    err = capsys.readouterr().err
    assert r"internal error: ZeroDivisionError: by \x1b zero" in err
    assert "please report this" in err
    assert "Traceback" not in err


def test_a_bug_is_json_where_reports_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert buggy.main(["--json"], standalone_mode=False) == ExitCode.FAILED
    assert json.loads(capsys.readouterr().out)["code"] == "internal-error"


def test_debug_tells_where_a_bug_is(capsys: pytest.CaptureFixture[str]) -> None:
    # Without its settings, click would keep a help option that lacks -h for the whole process.
    parent = click.Context(main.cli, **main.cli.context_settings)
    parent.params["debug"] = True
    with buggy.make_context("buggy", [], parent=parent) as context:
        assert buggy.invoke(context) == ExitCode.FAILED
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "\x1b" not in err
