# SPDX-License-Identifier: Apache-2.0
"""A commit in a domain of libvirt: top goes down into base by its block commit.

The end of an active one comes while the guest is suspended: top and base are the same when the
journal says that base is right from now on.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from chainmerge.documents.progress import Stage
from chainmerge.errors import ChainmergeError
from chainmerge.live.errors import VmRefused
from chainmerge.live.libvirt.disk import DomainJob, DomainJobKind
from chainmerge.live.libvirt.driver import DomainDriver
from chainmerge.records.live_journal import LiveState, load_live_journal, save_live_journal

# With the guest suspended only what it had written already is to be copied.
_SECONDS_TO_CATCH_UP: Final = 30.0
_SECONDS_BETWEEN_SHORT_LOOKS: Final = 0.02


@dataclass(kw_only=True)
class DomainCommitDriver(DomainDriver):
    """A commit that is driven through libvirt."""

    def _carry_out(self, *, begun: bool) -> None:
        while not self.nodes().is_merged:
            # The chain is what counts: an earlier run may have come further than the domain did.
            self.enter(LiveState.COPYING)
            self._copy(begun=begun)
            begun = True
            if self.journal.is_active and not self.nodes().is_merged:
                self._switch()

    def _is_ours(self, job: DomainJob) -> bool:
        return job.is_commit

    def _is_caught_up(self, job: DomainJob) -> bool:
        return job.kind is DomainJobKind.ACTIVE_COMMIT and job.caught_up

    def _start(self) -> None:
        nodes = self.nodes()
        try:
            self.disk.start_commit(nodes.merged[-1], nodes.result, self.options.bandwidth)
        except VmRefused as refused:
            raise self.not_started(refused.reason) from refused
        self.untouched = False

    def _switch(self) -> None:
        """Have the guest go on with base. It is suspended from before both are the same."""
        started = time.monotonic()
        self.announce(Stage.BITMAPS)
        if not self.disk.is_suspended():
            self.note(guest_to_resume=True)
            self.disk.suspend()
        try:
            self._wait_until_caught_up()
            self.enter_switching()
        except ChainmergeError:
            self._wake_guest()
            raise
        self.disk.pivot()
        self._let_guest_run()
        self.held_seconds = time.monotonic() - started

    def _wake_guest(self) -> None:
        """Have the guest go on with top. It does not wait for a journal that cannot be written.

        It does for one that has its name, and may not last: as long as that says that base is
        right, nobody may write to top.
        """
        with contextlib.suppress(ChainmergeError):
            written = load_live_journal(Path(self.result))
            if written is not None and written.took_effect:
                save_live_journal(self.journal)
            if self.journal.guest_to_resume and self.disk.is_suspended():
                self.disk.let_run()

    def _wait_until_caught_up(self) -> None:
        deadline = time.monotonic() + _SECONDS_TO_CATCH_UP
        while True:
            job = self.disk.block_job()
            if job is None:
                raise self.failed("the block commit ended before it could take effect")
            if job.caught_up:
                return
            if time.monotonic() > deadline:
                raise self.failed("the copy did not end although the guest was suspended")
            self.disk.wait_for_event(_SECONDS_BETWEEN_SHORT_LOOKS)
