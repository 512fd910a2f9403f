# SPDX-License-Identifier: Apache-2.0
"""Merges of one chain at the same time: each comes to its end, after the other."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge.documents.disks import DiskOutcome
from chainmerge.documents.merge import MergeOutcome
from chainmerge.documents.progress import Stage
from chainmerge.merging import preparing, settling
from chainmerge.merging.errors import DiskGone
from chainmerge.options import MergeOptions
from chainmerge.planning import locking
from chainmerge.records.disks import disk_file
from chainmerge.records.merged_record import MergedRecord, merged_record_file
from tests.support.qemu import assert_clean, content, create, qemu_io

if TYPE_CHECKING:
    from collections.abc import Callable

    from chainmerge.documents.merge import MergeReport
    from chainmerge.documents.progress import OnProgress, ProgressEvent

MIB = 1 << 20
DELETING = MergeOptions(delete=True)


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    images = [create(tmp_path / "0", 8 * MIB)]
    images += [create(tmp_path / str(n), backing=str(n - 1)) for n in range(1, 5)]
    for number, image in enumerate(images):
        qemu_io(image, f"write -P {number + 1} {number}M 1M")
    return images


def beside(first: Callable[[threading.Event], MergeReport], second: Callable[[], MergeReport],
           seen: threading.Event) -> tuple[MergeReport, MergeReport]:  # fmt: skip
    """Run *second* from when *first* has its locks; *first* goes on once *seen* is set."""
    begun = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        running: Future[MergeReport] = pool.submit(first, begun)
        assert begun.wait(60)
        waiting = pool.submit(second)
        assert seen.wait(60)
        return running.result(120), waiting.result(120)


def held_until(
    seen: threading.Event,
) -> Callable[[threading.Event], Callable[[ProgressEvent], None]]:
    def with_begun(begun: threading.Event) -> OnProgress:
        def on_progress(event: ProgressEvent) -> None:
            if event.stage is Stage.PLAN:
                begun.set()
                assert seen.wait(60)

        return on_progress

    return with_begun


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Is set when a merge that is not the first one has found its chain, and is about to lock."""
    seen = threading.Event()
    lock_all = locking.lock_all
    calls = []

    def noting(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) > 1:
            seen.set()
        return lock_all(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(preparing, "lock_all", noting)
    return seen


def test_the_same_merge_twice(chain: list[Path], waits: threading.Event) -> None:
    shown = content(chain[4])
    held = held_until(waits)
    stages: list[Stage] = []
    first, second = beside(
        lambda begun: chainmerge.merge(chain[3], options=DELETING, on_progress=held(begun)),
        lambda: chainmerge.merge(
            chain[3], options=DELETING, on_progress=lambda event: stages.append(event.stage)
        ),
        waits,
    )
    assert stages[:2] == [Stage.LOCK, Stage.WAIT], "whoever waits is told so"
    assert (first.outcome, second.outcome) == (MergeOutcome.MERGED, MergeOutcome.ALREADY_MERGED)
    assert not chain[3].exists()
    assert content(chain[4]) == shown
    assert_clean(chain[2])


def test_two_merges_of_one_chain(chain: list[Path], waits: threading.Event) -> None:
    shown = content(chain[4])
    held = held_until(waits)
    first, second = beside(
        lambda begun: chainmerge.merge(chain[1], options=DELETING, on_progress=held(begun)),
        lambda: chainmerge.merge(chain[3], options=DELETING),
        waits,
    )
    assert (first.outcome, second.outcome) == (MergeOutcome.MERGED, MergeOutcome.MERGED)
    assert not chain[1].exists()
    assert not chain[3].exists()
    assert content(chain[4]) == shown


def test_what_never_was_there_is_missing(tmp_path: Path) -> None:
    with pytest.raises(chainmerge.ChainmergeError) as caught:
        chainmerge.merge(tmp_path / "nothing")
    assert caught.value.exit_code == 3


def disks(directory: Path) -> list[Path]:
    tops = []
    for name in ("vda", "vdb", "vdc"):
        base = create(directory / f"{name}-base", 4 * MIB)
        qemu_io(base, "write -P 1 0 1M")
        tops.append(create(directory / f"{name}-top", backing=base.name))
        qemu_io(tops[-1], "write -P 2 1M 64k")
    return tops


def test_an_error_of_the_system_on_one_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tops = disks(tmp_path)
    shown = [content(top) for top in tops]
    unlink = Path.unlink

    def busy(path: Path, missing_ok: bool = False) -> None:
        if path == tops[1]:
            raise OSError(16, os.strerror(16), str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", busy)
    report = chainmerge.merge_disks(tops, options=DELETING)
    monkeypatch.undo()
    outcomes = [disk.outcome for disk in report.disks]
    assert outcomes == [DiskOutcome.MERGED, DiskOutcome.FAILED, DiskOutcome.MERGED]
    again = chainmerge.merge_disks(tops, options=DELETING)
    assert {disk.outcome for disk in again.disks} == {DiskOutcome.ALREADY_MERGED}
    assert not any(top.exists() for top in tops)
    assert [content(tmp_path / f"{name}-base") for name in ("vda", "vdb", "vdc")] == shown
    assert not disk_file(tmp_path / "vda-base").exists()


@pytest.mark.parametrize("is_done", [True, False])
def test_a_top_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_done: bool) -> None:
    tops = disks(tmp_path)
    if is_done:
        # The second disk fails, so that what holds them together stays.
        monkeypatch.setattr(settling, "record_intent", _failing_at(2))
        chainmerge.merge_disks(tops)
        monkeypatch.undo()
    tops[0].unlink()
    merged_record_file(tops[0]).unlink(missing_ok=True)
    before = [path.read_bytes() for path in tops[1:]]
    if is_done:
        report = chainmerge.merge_disks(tops)
        assert report.disks[0].outcome is DiskOutcome.ALREADY_MERGED
        assert all(disk.is_done for disk in report.disks)
        assert not disk_file(tmp_path / "vda-base").exists()
        return
    with pytest.raises(DiskGone) as caught:
        chainmerge.merge_disks(tops)
    assert [path.read_bytes() for path in tops[1:]] == before
    assert str(tops[1]) in caught.value.advice
    assert str(tops[0]) not in caught.value.advice
    assert all(disk.is_done for disk in chainmerge.merge_disks(tops[1:]).disks)


def _failing_at(number: int) -> Callable[..., MergedRecord | None]:
    calls = []
    record_intent = settling.record_intent

    def failing(*arguments: object) -> MergedRecord | None:
        calls.append(arguments)
        if len(calls) == number:
            raise OSError(5, os.strerror(5))
        return record_intent(*arguments)  # type: ignore[arg-type]

    return failing
