# SPDX-License-Identifier: Apache-2.0
"""Writes down now and then how far a copy has come, for whoever asks while it runs or after a kill.

A merge needs none of this: where it cannot be written, the copy goes on without.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from chainmerge.errors import ChainmergeError
from chainmerge.options import Direction
from chainmerge.records.doing import CopiedSoFar
from chainmerge.records.merge_journal import load_journal, save_journal
from chainmerge.records.merged_record import load_merged_record, record_merged

if TYPE_CHECKING:
    from chainmerge.merging.job import Job

# Each note waits for the storage; a copy that is done before the first one needs none.
SECONDS_BETWEEN: Final = 3.0


class CopyNotes:
    """The notes of one copy, which begins as this is made."""

    def __init__(self, job: Job) -> None:
        """Nothing is written down yet."""
        self._job = job
        self._began = time.monotonic()
        self._next = self._began + SECONDS_BETWEEN

    def update(self, done: int, total: int) -> None:
        """Say how many bytes are copied, of how many; most of it is not written down."""
        now = time.monotonic()
        if now < self._next:
            return
        with contextlib.suppress(ChainmergeError, OSError):
            _note(self._job, CopiedSoFar(done, total, now - self._began))
        self._next = time.monotonic() + SECONDS_BETWEEN


def _note(job: Job, copied: CopiedSoFar) -> None:
    """Write it into the file that this merge keeps, and never into one that is of another."""
    ours = job.recorded_request
    if job.facts.direction is Direction.PULL:
        record = load_merged_record(job.result.real_path)
        if record is not None and record.pulled is not None and record.request == ours:
            pulled = replace(record.pulled, copied=copied)
            record_merged(job.result.real_path, replace(record, pulled=pulled))
        return
    journal = load_journal(job.base.real_path)
    if journal is not None and journal.request == ours:
        save_journal(replace(journal, copied=copied))
