# SPDX-License-Identifier: Apache-2.0
"""Thirteen things that operators do, each in a few commands, as they are seen on a terminal.

What has to be known is on the first screen, 24 lines of 80 columns, and no line is wider.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

import chainmerge
from chainmerge.errors import ExitCode
from tests.support.cli import chainmerge as without_terminal
from tests.support.cli import environment
from tests.support.images import MIB
from tests.support.live_vm import running_vm, separate_nodes
from tests.support.loopdev import loop_device, mounted
from tests.support.operating import break_bitmap, chain, installed, kill_while_copying, path_with
from tests.support.qemu import assert_clean, bitmap_names, content, create, qemu_io
from tests.support.terminal import HEIGHT, Screen, typed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PLACE: Final = Path("/srv")
COLOUR: Final = re.compile(r"\x1b\[[0-9;]*3[0-7]m")
UNFINISHED: Final = ExitCode.UNFINISHED


@pytest.fixture
def images(tmp_path: Path) -> Iterator[Path]:
    """A directory with the short name of a real one, beside which there is nothing."""
    (tmp_path / "kept").mkdir()
    with mounted("-t", "tmpfs", "tmpfs", PLACE):
        place = PLACE / "images"
        place.mkdir()
        with mounted("--bind", tmp_path / "kept", place):
            yield place


def ran(*arguments: str, where: Path, status: int = 0, **more: Any) -> Screen:
    """The screen after a command, which must be readable as it is."""
    screen = typed(*arguments, where=where, **more)
    assert screen.status == status, screen.raw
    assert screen.too_wide == []
    assert "Traceback" not in screen.raw
    return screen


def on_one_screen(screen: Screen) -> None:
    assert screen.height <= HEIGHT, screen.raw


def test_1_delete_the_middle_snapshot(images: Path) -> None:
    chain(images)
    expected = content(images / "active.qcow2")
    plan = ran("plan", "--delete", "snap1.qcow2", where=images)
    assert "Merge snap1.qcow2 into base.qcow2" in plan.first
    assert "Gone then: the snapshot taken when snap1.qcow2 was created" in plan.first
    assert "Frees 2.25 MiB: snap1.qcow2 is deleted" in plan.first
    assert "Do it: chainmerge merge --delete snap1.qcow2" in plan.first
    on_one_screen(plan)
    done = ran("merge", "--delete", "snap1.qcow2", where=images)
    assert "Done: snap1.qcow2 is merged into base.qcow2" in done.first
    assert "snap2.qcow2 now uses base.qcow2 as its backing file" in done.first
    on_one_screen(done)
    assert not (images / "snap1.qcow2").exists()
    assert content(images / "active.qcow2") == expected


def test_2_delete_all_snapshots_and_keep_the_name(images: Path) -> None:
    chain(images)
    expected = content(images / "active.qcow2")
    done = ran("flatten", "--delete", "active.qcow2", where=images)
    assert "is pulled up into active.qcow2" in done.first
    assert "Deleted: snap2.qcow2, snap1.qcow2, base.qcow2" in done.first
    on_one_screen(done)
    assert [file.name for file in images.glob("[!.]*")] == ["active.qcow2"]
    assert content(images / "active.qcow2") == expected


def test_3_three_disks(images: Path) -> None:
    tops = []
    for disk in ("root", "data", "logs"):
        chain(images, [f"{disk}-base", f"{disk}-snap", disk])
        tops.append(f"{disk}-snap.qcow2")
    plan = ran("plan", "--delete", *tops, where=images)
    on_one_screen(plan)
    for top in tops:
        assert any(line.startswith(top) and line.endswith("merge") for line in plan.lines), plan.raw
    assert f"chainmerge merge --delete {' '.join(tops)}" in plan.first
    done = ran("merge", "--delete", *tops, where=images)
    on_one_screen(done)
    assert "3 of 3 disks merged" in done.first
    assert not any((images / top).exists() for top in tops)


def test_4_twelve_chains(images: Path) -> None:
    for number in range(11):
        names = [f"vm{number}-{level}" for level in range(1 + number % 4)]
        chain(images, names, 2 + number % 3)
    chain(images, [f"old-{level}" for level in range(40)], 1)
    listed = ran("list", where=images)
    on_one_screen(listed)
    assert "12 chains in /srv/images take" in listed.first
    # What frees most is first: 40 images that hide each other.
    rows = [line.split() for line in listed.lines if line.startswith(("vm", "old"))]
    assert len(rows) == 12
    assert rows[0][:2] == ["old-39.qcow2", "40"]
    frees = [float(row[6]) for row in rows]
    assert frees == sorted(frees, reverse=True)
    assert frees[0] == 39.0
    assert "--base old-0.qcow2 old-39.qcow2" in listed.first
    # How long depends on what is copied.
    heading = next(line for line in listed.lines if line.startswith("leaf"))
    assert heading.split() == ["leaf", "images", "disk", "on", "disk", "frees", "copies", "state"]
    assert ran("info", ".", where=images).lines == listed.lines


def test_5_an_inconsistent_bitmap(images: Path) -> None:
    active = chain(images)[-1]
    break_bitmap(active, "daily")
    listed = ran("bitmaps", "list", "active.qcow2", where=images)
    assert "in-use (inconsistent)" in listed.first
    assert "daily unusable" in listed.first
    left = ran("bitmaps", "repair", "active.qcow2", where=images, answer="n\n", status=3)
    assert "daily active.qcow2 inconsistent (in-use) in active.qcow2" in left.first
    assert set(bitmap_names(active)) == {"daily"}
    repaired = ran("bitmaps", "repair", "active.qcow2", where=images, answer="y\n")
    assert "The next backup must be a full one" in repaired.first
    on_one_screen(repaired)
    assert bitmap_names(active) == {}


@pytest.mark.parametrize("then", ["finish", "cancel"])
def test_6_killed_at_night(images: Path, then: str) -> None:
    base = chain(images, mib=12)[0]
    expected = content(images / "active.qcow2")
    kill_while_copying(base, "snap1.qcow2")
    status = ran("status", where=images, status=UNFINISHED)
    on_one_screen(status)
    assert "interrupted at" in status.first
    assert "of 12 MiB" in status.first
    assert "no data is lost" in status.first
    assert "may start from /srv/images/snap1.qcow2 or an image on it" in status.first
    commands = [line.strip() for line in status.lines if line.startswith("    chainmerge")]
    assert [command.split()[1] for command in commands] == ["merge", "cancel"]
    chosen = commands[then == "cancel"].split()[1:]
    ended = ran(*chosen, where=images)
    said = "is undone; no data has changed" if then == "cancel" else "Done: snap1.qcow2 is merged"
    assert said in ended.first
    assert "no unfinished merges" in ran("status", where=images).first
    assert content(images / "active.qcow2") == expected
    assert_clean(base)


def test_7_the_volume_is_too_small(images: Path, tmp_path: Path) -> None:
    with loop_device(tmp_path / "volume", 16 * MIB) as device:
        create(device, 64 * MIB)
        top = create(images / "top.qcow2", backing=device)
        qemu_io(top, "write -P 1 0 20M")
        allowed = ("--allow-backing", "/dev", "--sole-user")
        plan = ran("plan", *allowed, "top.qcow2", where=images, status=ExitCode.REFUSED)
    assert "REFUSED:" in plan.first
    assert "bytes more" in plan.first
    assert "enlarge the device to at least" in plan.first
    assert "pull instead (--direction pull)" in plan.first


def test_8_base_is_used_by_another_vm(images: Path) -> None:
    (images / "other").mkdir()
    chain(images, ("base", "snap1"))
    clone = create(images / "other" / "clone.qcow2", backing="../base.qcow2")
    plan = ran("plan", "snap1.qcow2", where=images, status=ExitCode.REFUSED)
    assert f"REFUSED: /srv/images/base.qcow2 is also the backing file of {clone}" in plan.first
    assert "pull instead (--direction pull)" in plan.first
    on_one_screen(plan)


def test_9_the_backing_file_was_moved(images: Path) -> None:
    base, top = chain(images, ("base", "snap1"))
    expected = content(top)
    (images / "archive").mkdir()
    moved = base.rename(images / "archive" / base.name)
    plan = ran("plan", "snap1.qcow2", where=images, status=ExitCode.REFUSED)
    assert str(moved) in plan.first
    assert "chainmerge relink /srv/images/snap1.qcow2 --backing NEW --unchecked" in plan.first
    relinked = ran(
        "relink", "snap1.qcow2", "--backing", "archive/base.qcow2", "--unchecked", where=images
    )
    assert "now has the backing file archive/base.qcow2" in relinked.first
    assert content(top) == expected


def test_10_a_running_vm(images: Path) -> None:
    chained = chain(images)
    socket = images / "web.qmp"

    def command_line(disk: Sequence[Path]) -> list[str]:
        return [*separate_nodes(disk), "-qmp", f"unix:{socket},server=on,wait=off"]

    with running_vm(images / "vm", chained, command_line) as vm:
        refused = ran("merge", "snap1.qcow2", where=images, status=ExitCode.REFUSED, alone=False)
        assert f"(pid {vm.process.pid})" in refused.first
        told = re.search(r"`chainmerge (live merge .*) snap1.qcow2`", refused.first)
        assert told is not None, refused.first
        assert told[1] == f"live merge --qmp {socket} --device disk0"
        command = (*told[1].split(), "--delete")
        middle = ran(*command, "snap1.qcow2", where=images, alone=False)
        assert "Done: snap1.qcow2 is merged into base.qcow2" in middle.first
        assert vm.chain() == ["active.qcow2", "snap2.qcow2", "base.qcow2"]
        active = ran(*command, "active.qcow2", where=images, alone=False)
        assert "Done: active.qcow2 is merged into snap2.qcow2" in active.first
        assert vm.chain() == ["snap2.qcow2", "base.qcow2"]


def test_11_from_a_script(images: Path) -> None:
    chain(images)
    script = """
        set -e
        plan=$(chainmerge plan --json --delete snap1.qcow2)
        test "$(jq .feasible <<<"$plan")" = true
        jq -e '.freed_bytes > 2000000 and (.delete | length == 1)' <<<"$plan"
        chainmerge merge --json --delete snap1.qcow2 | tail -1 | jq -e '.event == "report"'
        chainmerge status --json | jq -e '.merges == []'
        ! chainmerge plan --json missing.qcow2 >error
        jq -e '.code == "image-missing" and (.message | length > 0)' error
        ! chainmerge plan --frobnicate --json x >error
        jq -e '.code == "usage"' error
        chainmerge explain --json image-locked | jq -e '.code == "image-locked"'
        chainmerge list --json | jq -e '.chains[0].leaf == "/srv/images/active.qcow2"'
    """
    program = installed(images / "bin")
    told = subprocess.run(
        ["bash", "-c", script],
        cwd=images,
        capture_output=True,
        text=True,
        check=False,
        env=environment(PATH=path_with(program)),
    )
    assert (told.returncode, told.stderr) == (0, "")


def test_12_from_python(images: Path) -> None:
    """The example in README.md is run by tests/test_exports.py; here, what it imports."""
    chain(images)
    names = ("ChainmergeError", "Interrupted", "MergeOptions", "NoSpace", "ProgressEvent", "Stage")
    assert set(names) <= set(dir(chainmerge))
    seen: list[chainmerge.ProgressEvent] = []
    with pytest.raises(chainmerge.Interrupted):
        chainmerge.merge(images / "snap1.qcow2", should_stop=lambda: True)
    chainmerge.merge(images / "snap1.qcow2", on_progress=seen.append)
    assert {chainmerge.Stage.COPY, chainmerge.Stage.READ_BACK} <= {event.stage for event in seen}


@pytest.mark.parametrize("code", ["image-locked", "BASE-NEWER", "broken-bitmap"])
def test_13_errors_are_explained(images: Path, code: str) -> None:
    told = ran("explain", code, where=images)
    assert code.lower() in told.first
    on_one_screen(told)


@pytest.mark.parametrize("width", [80, 60])
def test_13_on_any_terminal(images: Path, width: int) -> None:
    chain(images)
    for arguments in (
        ("-V",),
        ("list",),
        ("scan", "--no-cache", "--hidden", "1"),
        ("plan", "snap1.qcow2"),
        ("merge", "--delete", "snap1.qcow2"),
        ("status",),
        ("bitmaps", "list", "active.qcow2"),
        ("info", "active.qcow2"),
        ("explain", "shared", "base"),
    ):
        ran(*arguments, where=images, width=width)


def test_13_quiet_without_colour_or_terminal(images: Path) -> None:
    chain(images)
    assert ran("merge", "-q", "--delete", "snap1.qcow2", where=images).raw.strip() == ""
    coloured = ran("status", where=images)
    plain = ran("status", where=images, NO_COLOR="1")
    assert plain.lines == coloured.lines
    assert COLOUR.search(coloured.sent)
    assert not COLOUR.search(plain.sent)
    piped = without_terminal("list", images)
    assert (piped.err, "\x1b" in piped.out) == ("", False)
    assert [line.split() for line in piped.out.splitlines()[3:]] == [
        line.split() for line in ran("list", where=images).lines[3:-1]
    ]
