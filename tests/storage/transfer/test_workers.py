# SPDX-License-Identifier: Apache-2.0
"""The threads of a transfer, where there is no memory for all of them."""

from __future__ import annotations

import threading

import pytest

from chainmerge.storage.errors import OutOfMemory
from chainmerge.storage.transfer import workers
from chainmerge.storage.transfer.direct import aligned_buffer
from chainmerge.storage.transfer.workers import Workers

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
    some = Workers(8, BUFFER)
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
    some = Workers(8, BUFFER)
    with pytest.raises(OutOfMemory), some.at_work():
        some.submit(lambda _buffer: 1, BUFFER, lambda _result: None)
