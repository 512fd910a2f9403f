# SPDX-License-Identifier: Apache-2.0
"""The threads of a transfer: how many, and where there is no memory for all of them."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from chainmerge.storage.errors import OutOfMemory
from chainmerge.storage.transfer import workers
from chainmerge.storage.transfer.direct import aligned_buffer
from chainmerge.storage.transfer.workers import Depth, Workers

if TYPE_CHECKING:
    from collections.abc import Callable

BUFFER = 4096


def test_as_many_threads_as_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers: list[int] = []

    def scarce(length: int) -> memoryview:
        if len(buffers) == 2:
            raise MemoryError
        buffers.append(length)
        return aligned_buffer(length)

    monkeypatch.setattr(workers, "aligned_buffer", scarce)
    threads: set[str] = set()
    results: list[int] = []
    some = Workers(Depth(8, 8), BUFFER)
    with some.at_work():
        for number in range(50):

            def job(_buffer: memoryview, number: int = number) -> int:
                threads.add(threading.current_thread().name + str(threading.get_ident()))
                return number

            some.submit(job, BUFFER, results.append)
    some.close()
    assert sorted(results) == list(range(50))
    assert len(buffers) == 2
    assert len(threads) <= 2


@pytest.mark.parametrize("lacks", ["memory", "threads"])
def test_no_thread_at_all(monkeypatch: pytest.MonkeyPatch, lacks: str) -> None:
    def nothing(*_arguments: object) -> None:
        raise MemoryError if lacks == "memory" else RuntimeError("can't start new thread")

    if lacks == "memory":
        monkeypatch.setattr(workers, "aligned_buffer", nothing)
    else:
        monkeypatch.setattr(threading.Thread, "start", nothing)
    some = Workers(Depth(8, 8), BUFFER)
    with pytest.raises(OutOfMemory), some.at_work():
        some.submit(lambda _buffer: 1, BUFFER, lambda _result: None)


def limits(per_second: Callable[[int], float], jobs: int, depth: Depth) -> list[int]:
    """The limits that *depth* goes through while storage does so many jobs at each of them."""
    seen = [depth.limit]
    now = 100.0
    depth.begin(now)
    for _ in range(jobs):
        now += 1 / per_second(depth.limit)
        depth.finished(now)
        if depth.limit != seen[-1]:
            seen.append(depth.limit)
    return seen


def test_storage_that_answers_late_gets_as_many_as_there_may_be() -> None:
    assert limits(lambda at_a_time: 50.0 * at_a_time, 2000, Depth(4, 16)) == [4, 8, 16]


def test_storage_that_is_busy_with_a_few_gets_no_more_after_one_trial() -> None:
    depth = Depth(4, 16)
    assert limits(lambda _at_a_time: 1000.0, 2000, depth) == [4, 8, 4]
    assert depth.limit == 4


def test_no_more_than_is_worthwhile() -> None:
    assert limits(lambda at_a_time: min(at_a_time, 8) * 50.0, 2000, Depth(4, 64)) == [4, 8, 16, 8]


def test_jobs_of_another_kind_are_tried_again() -> None:
    depth = Depth(4, 16)
    limits(lambda _at_a_time: 1000.0, 2000, depth)
    assert limits(lambda at_a_time: 50.0 * at_a_time, 2000, depth) == [4, 8, 16]


def test_few_threads_begin_and_no_more_are_made_than_are_worthwhile() -> None:
    storage = threading.Lock()
    some = Workers(Depth(2, 64), BUFFER)
    threads: set[int] = set()

    def one_at_a_time(_buffer: memoryview) -> int:
        with storage:
            time.sleep(0.001)
            return threading.get_ident()

    with some.at_work():
        for _ in range(200):
            some.submit(one_at_a_time, BUFFER, threads.add)
    some.close()
    assert 2 <= len(threads) < 64
