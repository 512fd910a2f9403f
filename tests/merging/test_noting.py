# SPDX-License-Identifier: Apache-2.0
"""Each merge leaves a line in the history, which is never in its way."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge import ChainmergeError, Interrupted, MergeOptions, MergeOutcome
from chainmerge.records.history import MergeLine, history_file
from chainmerge.storage.storage_names import storage_name
from tests.inventory.findings.building import chain
from tests.support.cli import chainmerge as run
from tests.support.cli import environment
from tests.support.images import MIB
from tests.support.qemu import create, qemu_io

if TYPE_CHECKING:
    from pathlib import Path

COLUMNS = ", ".join(MergeLine.__struct_fields__)


def lines() -> list[MergeLine]:
    """All of them, those that nothing is foretold from included."""
    if not history_file().exists():
        return []
    with contextlib.closing(sqlite3.connect(history_file())) as database:
        rows = database.execute(f"SELECT {COLUMNS} FROM merges_1 ORDER BY id").fetchall()
    return [MergeLine(*row) for row in rows]


def test_what_a_merge_leaves(tmp_path: Path) -> None:
    images = chain(tmp_path, "disk", 4)
    options = MergeOptions(delete=True, verify="metadata", engine="native")
    before = time.time()
    report = chainmerge.merge(images[2], images[0], options=options)
    assert report.plan is not None
    (line,) = lines()
    assert line.storage == storage_name(tmp_path)
    assert (line.engine, line.verify, line.live) == ("native", "metadata", False)
    assert (line.outcome, line.direction) == ("merged", "commit")
    assert (line.images, line.merged) == (4, 3)
    assert line.bytes_copied + line.bytes_shared == report.bytes_copied > 2 * MIB
    assert line.clusters == (report.plan.movement.new_clusters + report.plan.movement.new_l2_tables)
    assert line.bytes_freed == report.plan.freed_bytes > 0
    assert (line.seconds, line.copy_seconds) == (report.seconds, report.copy_seconds)
    assert int(before) <= line.at <= time.time()


@pytest.mark.parametrize("engine", ["native", "qemu"])
def test_by_both_engines(tmp_path: Path, engine: str) -> None:
    images = chain(tmp_path, "disk", 2)
    report = chainmerge.merge(images[1], options=MergeOptions(engine=engine))  # type: ignore[arg-type]
    (line,) = lines()
    assert line.engine == engine
    assert line.bytes_copied + line.bytes_shared == report.bytes_copied


def test_each_of_several_disks(tmp_path: Path) -> None:
    tops = [chain(tmp_path, name, 2)[1] for name in ("a", "b")]
    chainmerge.merge_disks(tops)
    assert [line.outcome for line in lines()] == ["merged", "merged"]


def test_each_range_that_is_thinned_out(tmp_path: Path) -> None:
    images = chain(tmp_path, "disk", 4)
    report = chainmerge.thin_out(images[3], chainmerge.Retention(keep_last=1))
    assert len(lines()) == len(report.ranges) > 0


def test_nothing_is_kept_if_that_is_said(tmp_path: Path) -> None:
    images = chain(tmp_path, "disk", 4)
    ran = run("merge", "-q", "--no-history", images[1])
    assert ran.status == 0, ran
    assert run("scan", "-q", "--no-history", "--no-cache", tmp_path).status == 0
    assert run("plan", "--no-history", images[2], "--json").json["prediction"] is None
    assert run("report", "-q", "--no-history", tmp_path, "-o", tmp_path / "x.html").status == 0
    with contextlib.suppress(sqlite3.OperationalError):
        assert lines() == []


def test_what_was_merged_before_is_no_merge(tmp_path: Path) -> None:
    images = chain(tmp_path, "disk", 2)
    chainmerge.merge(images[1])
    assert chainmerge.merge(images[1]).outcome is MergeOutcome.ALREADY_MERGED
    assert len(lines()) == 1


def test_what_is_refused_is_no_merge(tmp_path: Path) -> None:
    images = chain(tmp_path, "disk", 2)
    with pytest.raises(ChainmergeError):
        chainmerge.merge(images[1], options=MergeOptions(size_limit=MIB))
    assert lines() == []


def test_one_that_was_stopped_and_finished(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2", 64 * MIB)
    top = create(tmp_path / "top.qcow2", backing=base)
    qemu_io(top, "write -P 1 0 40M")
    begun = False

    def note(event: chainmerge.ProgressEvent) -> None:
        nonlocal begun
        begun = begun or event.stage is chainmerge.Stage.COPY

    with pytest.raises(Interrupted):
        chainmerge.merge(
            top,
            options=MergeOptions(engine="qemu", bandwidth=8 * MIB),
            on_progress=note,
            should_stop=lambda: begun,
        )
    chainmerge.merge(top, options=MergeOptions(engine="qemu"))
    stopped, finished = lines()
    assert (stopped.outcome, stopped.seconds, stopped.bandwidth) == ("interrupted", None, 8 * MIB)
    assert (finished.outcome, finished.bandwidth) == ("finished", None)


def test_a_history_that_cannot_be_used_is_in_nobodys_way(tmp_path: Path) -> None:
    images = chain(tmp_path, "disk", 3)
    history_file().parent.mkdir(parents=True)
    history_file().write_bytes(b"SQLite format 3\0" + bytes(5000))
    assert chainmerge.merge(images[2]).outcome is MergeOutcome.MERGED
    assert len(lines()) == 1
    history_file().unlink()
    history_file().mkdir()
    assert chainmerge.plan(images[1]).prediction is not None
    assert chainmerge.merge(images[1]).outcome is MergeOutcome.MERGED


def test_a_locked_history_holds_nobody_up(tmp_path: Path) -> None:
    images = chain(tmp_path, "disk", 3)
    chainmerge.merge(images[2])
    with contextlib.closing(sqlite3.connect(history_file(), isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        report = chainmerge.merge(images[1])
        assert report.outcome is MergeOutcome.MERGED
    assert len(lines()) == 1


def test_the_database_is_loaded_when_all_is_done(tmp_path: Path) -> None:
    """As the images are then, whatever becomes of the process."""
    images = chain(tmp_path, "disk", 2)
    script = (
        "import sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'sqlite3': print('loaded', flush=True); sys.stdin.readline()\n"
        "sys.meta_path.insert(0, Watch())\n"
        "import chainmerge; chainmerge.merge(sys.argv[1])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(images[1])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"loaded\n"
        # Nobody holds a lock, and nothing is left to be done.
        assert chainmerge.merge(images[1]).outcome is MergeOutcome.ALREADY_MERGED
        assert chainmerge.status([tmp_path]).merges == ()
        process.communicate(b"\n")
    assert process.returncode == 0
    assert len(lines()) == 1
