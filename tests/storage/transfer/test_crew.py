# SPDX-License-Identifier: Apache-2.0
"""The crew where there is no memory for all of it."""

from __future__ import annotations

import threading

import pytest

from chainmerge.storage.errors import OutOfMemory
from chainmerge.storage.transfer import crew
from chainmerge.storage.transfer.crew import Workers
from chainmerge.storage.transfer.direct import aligned_buffer

BUFFER = 4096


def test_a_crew_of_as_many_as_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    hired: list[int] = []

    def scarce(length: int) -> memoryview:
        if len(hired) == 2:
            raise MemoryError
        hired.append(length)
        return aligned_buffer(length)

    monkeypatch.setattr(crew, "aligned_buffer", scarce)
    threads: set[str] = set()
    results: list[int] = []
    team = Workers(8, BUFFER)
    with team.at_work():
        for number in range(50):

            def job(_buffer: memoryview, number: int = number) -> int:
                threads.add(threading.current_thread().name + str(threading.get_ident()))
                return number

            team.submit(job, BUFFER, results.append)
    team.close()
    assert sorted(results) == list(range(50))
    assert len(hired) == 2
    assert len(threads) <= 2


@pytest.mark.parametrize("lacks", ["memory", "threads"])
def test_no_crew_at_all(monkeypatch: pytest.MonkeyPatch, lacks: str) -> None:
    def nothing(*_arguments: object) -> None:
        raise MemoryError if lacks == "memory" else RuntimeError("can't start new thread")

    if lacks == "memory":
        monkeypatch.setattr(crew, "aligned_buffer", nothing)
    else:
        monkeypatch.setattr(threading.Thread, "start", nothing)
    team = Workers(8, BUFFER)
    with pytest.raises(OutOfMemory), team.at_work():
        team.submit(lambda _buffer: 1, BUFFER, lambda _result: None)
