# SPDX-License-Identifier: Apache-2.0
"""Commands that nobody watches: --quiet, --dry-run and --yes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from chainmerge.__about__ import __version__
from chainmerge.errors import ExitCode
from tests.support import qemu
from tests.support.cli import chainmerge
from tests.support.images import MIB

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def chain(tmp_path: Path) -> tuple[Path, Path]:
    base = qemu.create(tmp_path / "base.qcow2", 8 * MIB)
    top = qemu.create(tmp_path / "top.qcow2", backing=base)
    qemu.qemu_io(top, "write -P 2 1M 1M")
    return base, top


@pytest.mark.parametrize("command", [("merge", "-q"), ("flatten", "--quiet")])
def test_nothing_is_said_of_success(chain: tuple[Path, Path], command: tuple[str, ...]) -> None:
    _, top = chain
    expected = qemu.content(top)
    ran = chainmerge(*command, top)
    assert (ran.status, ran.out, ran.err) == (ExitCode.DONE, "", "")
    assert qemu.content(top) == expected


def test_several_disks_are_as_quiet(chain: tuple[Path, Path], tmp_path: Path) -> None:
    _, top = chain
    second = qemu.create(tmp_path / "second.qcow2", MIB)
    other = qemu.create(tmp_path / "other.qcow2", backing=second)
    ran = chainmerge("merge", "-q", top, other)
    assert (ran.status, ran.out, ran.err) == (ExitCode.DONE, "", "")


def test_a_refusal_is_said(chain: tuple[Path, Path]) -> None:
    base, top = chain
    qemu.create(base.parent / "clone.qcow2", backing=base)
    ran = chainmerge("merge", "-q", top)
    assert (ran.status, ran.out) == (ExitCode.REFUSED, "")
    assert "base-has-other-children" in ran.err
    planned = chainmerge("merge", "-q", "-n", top)
    assert planned.status == ExitCode.REFUSED
    assert "base-has-other-children" in planned.out


def test_a_warning_is_said(chain: tuple[Path, Path]) -> None:
    base, top = chain
    # Longer than the overlay, as if somebody had resized it underneath.
    qemu.qemu_img("resize", base, str(16 * MIB))
    loud = chainmerge("plan", "--json", top).json
    assert loud["warnings"]
    ran = chainmerge("merge", "-q", top)
    assert (ran.status, ran.out) == (ExitCode.DONE, "")
    assert ran.err.splitlines() == [f"chainmerge: warning: {said}" for said in loud["warnings"]]


def test_quiet_json_is_one_line(chain: tuple[Path, Path]) -> None:
    _, top = chain
    (line,) = chainmerge("merge", "-q", "--json", top).out.splitlines()
    assert json.loads(line)["event"] == "report"


@pytest.mark.parametrize("command", [("bitmaps", "add"), ("bitmaps", "remove")])
def test_changes_of_bitmaps_are_quiet(chain: tuple[Path, Path], command: tuple[str, ...]) -> None:
    _, top = chain
    if "remove" in command:
        qemu.qemu_img("bitmap", "--add", top, "daily")
    ran = chainmerge(*command, "-q", top, "daily")
    assert (ran.status, ran.out, ran.err) == (ExitCode.DONE, "", "")
    assert ("daily" in qemu.bitmap_names(top)) == ("add" in command)


@pytest.mark.parametrize("option", ["-n", "--dry-run"])
@pytest.mark.parametrize("command", ["merge", "flatten"])
def test_a_dry_run_is_the_plan(chain: tuple[Path, Path], command: str, option: str) -> None:
    before = [image.read_bytes() for image in chain]
    _, top = chain
    shown = chainmerge(command, option, top)
    assert (shown.status, shown.err) == (ExitCode.DONE, "")
    assert str(top) in shown.out
    plan = chainmerge(command, option, "--json", top).json
    same = chainmerge(
        "plan", *(("--direction", "pull") if command == "flatten" else ()), "--json", top
    )
    # How much is free, and which places were searched, depends on what others do meanwhile.
    for field in ("version", "base", "top", "images", "movement", "bitmaps", "refusals"):
        assert plan[field] == same.json[field]
    assert [image.read_bytes() for image in chain] == before


def test_a_dry_run_of_several_disks_is_their_plan(chain: tuple[Path, Path]) -> None:
    base, top = chain
    ran = chainmerge("merge", "-n", "--json", top, base)
    assert ran.status == chainmerge("plan", top, base).status
    assert ran.status != ExitCode.DONE


@pytest.mark.parametrize("option", ["-y", "--yes"])
def test_yes_is_spelled_in_two_ways(chain: tuple[Path, Path], option: str) -> None:
    base, _ = chain
    qemu.qemu_img("bitmap", "--add", base, "daily")
    ran = chainmerge("bitmaps", "remove", base, "--all", "--force", option)
    assert ran.status == ExitCode.DONE
    assert qemu.bitmap_names(base) == {}
    assert chainmerge("repair", option, base).status == ExitCode.DONE


def test_the_version_has_a_short_option() -> None:
    assert chainmerge("-V").out == f"chainmerge {__version__}\n"
