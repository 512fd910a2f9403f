# SPDX-License-Identifier: Apache-2.0
"""Every command on real images: what it does, how it ends, and that its JSON keeps its schema."""

from __future__ import annotations

import json
import os
import pty
import shlex
import signal
import subprocess
from typing import TYPE_CHECKING, TypeVar

import msgspec
import pytest

from chainmerge.documents.bitmaps import BitmapChange, BitmapListing, PruneReport
from chainmerge.documents.images import ChainReport, CheckResult
from chainmerge.documents.merge import Measurement, MergeReport
from chainmerge.documents.plan import MergePlan
from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.documents.repair import RepairReport, UndoReport
from chainmerge.documents.status import StatusReport
from chainmerge.errors import ExitCode
from chainmerge.report.json import ErrorReport
from tests.support import qemu
from tests.support.cli import COMMAND, Ran, chainmerge, environment
from tests.support.surgery import L1_OFFSET

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
Document = TypeVar("Document")


@pytest.fixture
def chain(tmp_path: Path) -> tuple[Path, Path]:
    """Base with a stale and a good bitmap, and top with the good one; some data in both."""
    base = qemu.create(tmp_path / "base.qcow2", 64 * MIB)
    for name in ("stale", "daily"):
        qemu.qemu_img("bitmap", "--add", base, name)
    qemu.qemu_io(base, "write -P 1 1M 1M")
    top = qemu.create(tmp_path / "top.qcow2", backing=base)
    qemu.qemu_img("bitmap", "--add", top, "daily")
    qemu.qemu_io(top, "write -P 2 4M 8M", "write -z 16M 1M")
    return base, top


def document(ran: Ran, kind: type[Document], status: int = ExitCode.DONE) -> Document:
    """The JSON of a command, checked against the type that its schema is made from."""
    assert ran.status == status, ran
    assert ran.err == ""
    return msgspec.json.decode(ran.out.splitlines()[-1], type=kind)


def test_plan_changes_nothing_and_names_everything(chain: tuple[Path, Path]) -> None:
    base, top = chain
    before = base.read_bytes(), top.read_bytes()
    plan = document(chainmerge("plan", "--json", top), MergePlan)
    assert {bitmap.name: bitmap.fate for bitmap in plan.bitmaps} == {
        "daily": "keep",
        "stale": "prune",
    }
    shown = chainmerge("plan", top)
    assert shown.status == ExitCode.DONE
    answer = (
        f"Merge top.qcow2 into base.qcow2, in {base.parent}\n",
        f"Do it: chainmerge merge {top}",
    )
    for said in (*answer, "1 kept (daily)", "1 pruned (stale)"):
        assert said in shown.out
    in_full = chainmerge("plan", "--verbose", top)
    for said in (*answer, str(base), str(top), "daily", "keep", "stale", "prune", "8388608"):
        assert said in in_full.out
    assert (base.read_bytes(), top.read_bytes()) == before


def test_a_plan_that_will_be_refused_exits_3(chain: tuple[Path, Path]) -> None:
    base, top = chain
    qemu.create(base.parent / "clone.qcow2", backing=base)
    plan = document(chainmerge("plan", "--json", top), MergePlan, ExitCode.REFUSED)
    assert [refusal.code for refusal in plan.refusals] == ["base-has-other-children"]
    refused = chainmerge("merge", top)
    assert refused.status == ExitCode.REFUSED
    assert "base-has-other-children" in refused.err


def test_merge_in_words(chain: tuple[Path, Path]) -> None:
    base, top = chain
    expected = qemu.content(top)
    ran = chainmerge("merge", top)
    assert ran.status == ExitCode.DONE, ran.err
    assert f"top.qcow2 is merged into base.qcow2, in {base.parent}\n" in ran.out
    assert f"must now name:\n  {base} (qcow2)\n" in ran.out
    assert "copying data" in ran.err
    assert qemu.content(base) == expected
    again = chainmerge("merge", top)
    assert again.status == ExitCode.DONE
    assert "; verified again" in again.out


@pytest.mark.parametrize("command", ["merge", "flatten"])
def test_a_dry_run_shows_the_plan_and_its_command(command: str, chain: tuple[Path, Path]) -> None:
    base, top = chain
    before = base.read_bytes(), top.read_bytes()
    options = ("--search", top.parent, "--delete", "-n", "-v", "--leave=1G")
    ran = chainmerge(command, *options, "--", top)
    assert ran.status == ExitCode.DONE, ran.err
    does_it = f"chainmerge {command} --search {top.parent} --delete --leave 1G {top}"
    assert f"Do it: {does_it}\n" in ran.out
    document(chainmerge(command, "--json", "--dry-run", top), MergePlan)
    assert (base.read_bytes(), top.read_bytes()) == before


def test_merge_in_json(chain: tuple[Path, Path]) -> None:
    _, top = chain
    ran = chainmerge("merge", "--json", top)
    report = document(ran, MergeReport)
    assert [(bitmap.name, bitmap.state) for bitmap in report.bitmaps] == [("daily", "valid")]
    *progress, last = [json.loads(line) for line in ran.out.splitlines()]
    assert last["event"] == "report"
    assert {event.pop("event") for event in progress} == {"progress"}
    stages = [msgspec.convert(event, ProgressEvent).stage for event in progress]
    assert stages.index(Stage.COPY) < stages.index(Stage.READ_BACK) < stages.index(Stage.VERIFY)
    assert 0 < report.copy_seconds < report.seconds


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_merge_is_finished_by_the_same_command(
    chain: tuple[Path, Path], number: signal.Signals
) -> None:
    base, top = chain
    expected = qemu.content(top)
    # A shell lets its background jobs, and all that they start, ignore SIGINT.
    listening = ("env", "--default-signal=INT")
    command = [*listening, *COMMAND, "merge", "--json", "--bandwidth", "256K", str(top)]
    # A session of its own is what a terminal's Ctrl-C would reach as a whole.
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event.get("stage") == "copy" and event["done"] > 0:
                break
        process.send_signal(number)
        process.send_signal(number)
        rest, notice = process.communicate(timeout=60)
    assert process.returncode == ExitCode.INTERRUPTED
    error = msgspec.json.decode(rest.splitlines()[-1], type=ErrorReport)
    assert error.code == "interrupted"
    assert notice.count("stopping at the next safe point") == 1
    assert qemu.content(top) == expected
    report = document(chainmerge("merge", "--json", top), MergeReport)
    assert [(bitmap.name, bitmap.state) for bitmap in report.bitmaps] == [("daily", "valid")]
    assert qemu.content(base) == expected
    qemu.assert_clean(base)


@pytest.mark.parametrize("name", ["INT", "HUP"])
def test_what_is_ignored_from_the_start_stays_ignored(chain: tuple[Path, Path], name: str) -> None:
    """A background job of a shell, or one under nohup: what the terminal sends is not for it."""
    base, top = chain
    expected = qemu.content(top)
    with subprocess.Popen(
        ["env", f"--ignore-signal={name}", *COMMAND, "merge", "--json", "--bandwidth", "8M", top],
        stdout=subprocess.PIPE,
        env=environment(),
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event.get("stage") == "copy":
                process.send_signal(getattr(signal, f"SIG{name}"))
        process.wait()
    assert process.returncode == ExitCode.DONE
    assert qemu.content(base) == expected


def test_status_names_what_finishes_an_interrupted_merge(chain: tuple[Path, Path]) -> None:
    base, top = chain
    expected = qemu.content(top)
    assert "no unfinished merges" in chainmerge("status", base.parent).out
    with subprocess.Popen(
        [*COMMAND, "merge", "--json", "--delete", "--bandwidth", "8M", str(top)],
        stdout=subprocess.PIPE,
        env=environment(),
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event.get("stage") == "copy" and event["done"] > 0:
                break
        # It cannot come to its end while it is looked at.
        process.send_signal(signal.SIGSTOP)
        running = document(chainmerge("status", "--json", top), StatusReport, ExitCode.UNFINISHED)
        process.kill()
    (merge,) = running.merges
    assert (merge.base_is_locked, merge.vm_may_start, merge.cancel_command) == (True, False, None)
    assert merge.process is not None
    assert (merge.process.pid, merge.process.running) == (process.pid, True)
    ran = chainmerge("status", "--json", base.parent)
    (merge,) = document(ran, StatusReport, ExitCode.UNFINISHED).merges
    assert (merge.base, merge.top, merge.state) == (str(base), str(top), "prepared")
    assert merge.base_holds_data is False
    assert not merge.base_is_locked
    assert (merge.vm_may_start, merge.vm_image) == (True, str(top))
    assert merge.process is not None
    assert not merge.process.running
    shown = chainmerge("status", base)
    assert shown.status == ExitCode.UNFINISHED
    assert merge.command is not None
    assert merge.command in shown.out
    program, *arguments = shlex.split(merge.command)
    assert program == "chainmerge"
    assert chainmerge(*arguments).status == ExitCode.DONE
    assert qemu.content(base) == expected
    assert not top.exists()
    assert not document(chainmerge("status", "--json", top), StatusReport).merges


def test_status_of_a_directory_that_is_not_there(tmp_path: Path) -> None:
    error = document(
        chainmerge("status", "--json", tmp_path / "no" / "image"), ErrorReport, ExitCode.REFUSED
    )
    assert error.code == "search-path-unusable"


def test_info(chain: tuple[Path, Path]) -> None:
    base, top = chain
    report = document(chainmerge("info", "--json", top), ChainReport)
    assert [image.path for image in report.images] == [str(base), str(top)]
    assert str(base) in chainmerge("info", top).out


def test_check_tells_damage_by_its_status(chain: tuple[Path, Path]) -> None:
    base, _ = chain
    assert document(chainmerge("check", "--json", base), CheckResult).clean
    with base.open("r+b") as file:
        # The first refcount block: from here on nothing is marked used.
        file.seek(int.from_bytes(_at(base, _at_number(base, 48), 8)))
        file.write(bytes(65536))
    damaged = document(chainmerge("check", "--json", base), CheckResult, ExitCode.FAILED)
    assert damaged.corruptions > 0
    assert damaged.messages


def test_measure(chain: tuple[Path, Path]) -> None:
    _, top = chain
    measurement = document(chainmerge("measure", "--json", top), Measurement)
    assert measurement.required >= measurement.optimal > 9 * MIB


def test_bitmaps_list(chain: tuple[Path, Path]) -> None:
    _, top = chain
    listing = document(chainmerge("bitmaps", "list", "--json", top), BitmapListing)
    assert {verdict.name: verdict.passes for verdict in listing.verdicts} == {
        "daily": True,
        "stale": False,
    }
    assert "usable" in chainmerge("bitmaps", "list", top).out


@pytest.mark.parametrize("name", ["weekly", "-dashed", 'it\'s "quoted"', "n" * 1023])
def test_bitmaps_of_any_name_come_and_go(chain: tuple[Path, Path], name: str) -> None:
    _, top = chain
    add = ("bitmaps", "add", "--json", "--granularity", "4K", "--disabled", "--", top, name)
    added = document(chainmerge(*add), BitmapChange)
    found = {bitmap.name: bitmap for bitmap in added.bitmaps}[name]
    assert (found.state, found.granularity) == ("disabled", 4096)
    assert qemu.bitmap_names(top)[name]["flags"] == []
    removed = document(
        chainmerge("bitmaps", "remove", "--json", "--force", "--", top, name), BitmapChange
    )
    assert [bitmap.name for bitmap in removed.bitmaps] == ["daily"]
    qemu.assert_clean(top)


def test_bitmaps_merge(chain: tuple[Path, Path]) -> None:
    base, top = chain
    command = ("bitmaps", "merge", "--json", top, "daily", "stale", "--from", base)
    change = document(chainmerge(*command), BitmapChange)
    assert [bitmap.dirty_bytes for bitmap in change.bitmaps] == [10 * MIB]


def test_bitmaps_clear(chain: tuple[Path, Path]) -> None:
    base, _ = chain
    change = document(chainmerge("bitmaps", "clear", "--json", base, "stale"), BitmapChange)
    assert change.names == ("stale",)
    assert set(qemu.bitmap_names(base)) == {"daily", "stale"}
    assert qemu.dirty_ranges(base, "stale") == []
    before = base.read_bytes()
    assert chainmerge("bitmaps", "clear", base).status == ExitCode.USAGE
    assert chainmerge("bitmaps", "clear", base, "daily").status == ExitCode.REFUSED
    assert base.read_bytes() == before


@pytest.mark.parametrize("options", [(), ("stale", "--all"), ("--all",)])
def test_bitmaps_are_not_removed_unasked(
    chain: tuple[Path, Path], options: tuple[str, ...]
) -> None:
    base, _ = chain
    before = base.read_bytes()
    assert chainmerge("bitmaps", "remove", base, *options).status == ExitCode.USAGE
    assert base.read_bytes() == before


def test_all_bitmaps_are_removed_by_scripts(chain: tuple[Path, Path]) -> None:
    base, _ = chain
    remove = ("bitmaps", "remove", "--json", "--all", "--yes", "--force", base)
    assert sorted(document(chainmerge(*remove), BitmapChange).names) == ["daily", "stale"]
    assert qemu.bitmap_names(base) == {}


@pytest.mark.parametrize(("answer", "status"), [("y", ExitCode.DONE), ("n", ExitCode.REFUSED)])
def test_all_bitmaps_are_removed_after_a_question(
    chain: tuple[Path, Path], answer: str, status: ExitCode
) -> None:
    base, _ = chain
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, "bitmaps", "remove", "--all", "--force", base],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as asked:
        os.write(ours, f"{answer}\n".encode())
        _, said = asked.communicate()
    os.close(ours)
    os.close(theirs)
    assert asked.returncode == status, said
    assert b"'stale'" in said
    assert bool(qemu.bitmap_names(base)) == (status is ExitCode.REFUSED)


def test_bitmaps_prune(chain: tuple[Path, Path]) -> None:
    base, top = chain
    report = document(chainmerge("bitmaps", "prune", "--json", top), PruneReport)
    assert [(bitmap.image, bitmap.name) for bitmap in report.removed] == [(str(base), "stale")]
    assert list(qemu.bitmap_names(base)) == ["daily"]


def test_repair_shows_first(chain: tuple[Path, Path]) -> None:
    base, _ = chain
    _leave_in_use(base)
    broken = base.read_bytes()
    for options in ((), ("--dry-run",)):
        shown = document(chainmerge("repair", "--json", *options, base), RepairReport)
        assert shown.findings
        assert shown.consequences
        assert base.read_bytes() == broken
    assert f"chainmerge repair --yes {base}" in chainmerge("repair", base).out
    done = document(chainmerge("repair", "--json", "--yes", base), RepairReport)
    # Top still has the name, and must not pass for a good one without base's bits.
    assert {name: b["flags"] for name, b in qemu.bitmap_names(base).items()} == {"daily": []}
    assert "nothing to repair" in chainmerge("repair", base).out
    assert done.backup is not None
    undone = document(chainmerge("repair", "--json", "--undo", done.backup), UndoReport)
    assert undone.image == str(base)
    assert base.read_bytes() == broken


@pytest.mark.parametrize(
    "arguments",
    [(), ("--yes",), ("--yes", "--dry-run", "x"), ("--undo", "b", "x"), ("--undo", "b", "--yes")],
)
def test_repair_that_makes_no_sense(arguments: tuple[str, ...]) -> None:
    assert chainmerge("repair", *arguments).status == ExitCode.USAGE


def test_repair_that_leaves_damage_fails(chain: tuple[Path, Path]) -> None:
    base, _ = chain
    L1_OFFSET.put(base, L1_OFFSET.get(base) - 65536)
    ran = chainmerge("repair", base)
    assert (ran.status, "cannot be repaired here" in ran.out) == (ExitCode.DONE, True), ran
    assert chainmerge("repair", "--yes", base).status == ExitCode.FAILED


def _leave_in_use(image: Path) -> None:
    """Kill QEMU while it has the image open for writing."""
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(image)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("write -P 9 0 64k\n")
        process.stdin.flush()
        for line in process.stdout:
            if "wrote" in line:
                break
        process.kill()


def _at(image: Path, offset: int, length: int) -> bytes:
    with image.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def _at_number(image: Path, offset: int) -> int:
    return int.from_bytes(_at(image, offset, 8))


@pytest.mark.parametrize(
    "arguments",
    [("plan",), ("merge",), ("bitmaps", "list"), ("info",), ("check",), ("bitmaps", "prune")],
    ids=" ".join,
)
def test_with_nothing_to_activate(chain: tuple[Path, Path], arguments: tuple[str, ...]) -> None:
    _, top = chain
    ran = chainmerge(*arguments, "--activate", top)
    assert ran.status == ExitCode.DONE, ran
    if arguments == ("plan",):
        ran = chainmerge(*arguments, "--activate", top, top)
        assert "internal error" not in ran.err, ran
