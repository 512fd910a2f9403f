# SPDX-License-Identifier: Apache-2.0
"""A live merge in a domain of libvirt.

libvirt's block commit copies, unites the bitmaps, moves the domain's description along and closes
merged images; we see to what comes before and after it. Stale bitmaps go first, while no job is in
the way. The end of an active merge comes while the guest is suspended: top and base are the same
when the journal says that base is right from now on. docs/live-merge.md has the order, and what a
death in each step leaves.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from chainmerge.bitmaps.rules import BitmapState
from chainmerge.documents.bitmaps import BitmapResult
from chainmerge.documents.progress import Stage
from chainmerge.live.driver import GIVEN_UP, LiveDriver
from chainmerge.live.errors import LiveMergeFailed, VmRefused
from chainmerge.live.libvirt.disk import DomainDisk, DomainJobKind
from chainmerge.live.port import JobPhase, JobState
from chainmerge.merging.verifying import verify_bitmaps_cover
from chainmerge.records.live_journal import LiveState

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.engines.metadata.bitmap_set import StoredBitmap
    from chainmerge.live.merge_nodes import MergeNodes
    from chainmerge.live.nodes import BlockNode
    from chainmerge.qcow2.image import Qcow2Image

# With the guest suspended only what it had written already is to be copied.
_SECONDS_TO_CATCH_UP: Final = 30.0
_SECONDS_BETWEEN_SHORT_LOOKS: Final = 0.02
_LOOKS_FOR_THE_CHAIN: Final = 40


@dataclass(kw_only=True)
class DomainDriver(LiveDriver[DomainDisk]):
    """A live merge that is driven through libvirt."""

    VM: ClassVar[str] = "the domain"
    TELLER: ClassVar[str] = "libvirt"

    def until_merged(self) -> None:
        try:
            self._merge()
        except (VmRefused, *GIVEN_UP) as failure:
            if self._ends_merged():
                return
            self._undo()
            if isinstance(failure, VmRefused):
                raise self.failed(failure.reason) from failure
            raise

    def _merge(self) -> None:
        if self.journal.state is LiveState.UNDOING:
            raise self.failed("an earlier run had given it up")
        begun = self.journal.state is not LiveState.PREPARING
        if not begun:
            self._prune()
            self.enter(LiveState.COPYING)
        while not self.nodes().is_merged:
            # The chain is what counts: an earlier run may have come further than the domain did.
            self.enter(LiveState.COPYING)
            self._copy(begun=begun)
            begun = True
            if self.journal.is_active and not self.nodes().is_merged:
                self._switch()

    # Giving up

    def _ends_merged(self) -> bool:
        """End the job, if there is one; says whether the merge has taken effect all the same."""
        begun = self.journal.state is not LiveState.PREPARING
        # Until it is known whether the guest has gone over to base, base is right.
        if self.journal.state is not LiveState.SWITCHING:
            self.enter(LiveState.UNDOING)
        if not begun:
            return False
        job = self.disk.block_job()
        if job is not None and job.is_commit:
            # It may have ended by itself in between.
            with contextlib.suppress(VmRefused):
                self.disk.cancel()
                return self.nodes().is_merged
        return self._is_merged_soon()

    def _undo(self) -> None:
        """Have everything as it was, but for the stale bitmaps."""
        self.enter(LiveState.UNDOING)
        self.let_guest_go()
        self.forget_records()

    def let_guest_go(self) -> None:
        """Have a guest run that was suspended for the merge, as fast as it did."""
        self._let_guest_run()
        super().let_guest_go()

    def _let_guest_run(self) -> None:
        if self.journal.guest_to_resume:
            if self.disk.is_suspended():
                self.disk.let_run()
            self.note(guest_to_resume=False)

    # The steps

    def _prune(self) -> None:
        self.announce(Stage.PRUNE)
        self.untouched = self.untouched and not self.journal.stale
        there = self.disk.known_names()
        for name in self._names_to_remove():
            if name in there:
                self.disk.remove_everywhere(name)

    def _names_to_remove(self) -> tuple[str, ...]:
        """The names that go from all images of the chain.

        Journals of earlier versions have some of them as tombstones, which libvirt leaves none of.
        """
        return (*self.journal.stale, *(one.name for one in self.journal.tombstones))

    def _copy(self, *, begun: bool) -> None:
        """Have libvirt copy until nothing is left, or the chain is merged.

        Args:
            begun: Whether a job may have been started before, and ended in the meantime.
        """
        self.announce(Stage.COPY)
        extensions_before: int | None = None
        while not self.nodes().is_merged:
            job = self.disk.block_job()
            if job is None:
                if begun and self._is_merged_soon():
                    return
                # Where it ends early, as for want of space, it can go on from where it was; but
                # only if there is more space now than when it began.
                now = self.headroom.extensions
                if now == extensions_before:
                    raise self._ended_early()
                if begun:
                    self.headroom.widen()
                extensions_before = now
                self._start()
                begun = True
                continue
            if not job.is_commit:
                raise self.failed(f"another block job ({job.kind}) runs on this disk")
            if job.kind is DomainJobKind.ACTIVE_COMMIT and job.caught_up:
                self.copied = job.done
                return
            self.follow(JobState(JobPhase.RUNNING, job.done, job.total))

    def _start(self) -> None:
        nodes = self.nodes()
        try:
            self.disk.start_commit(nodes.overlays[-1], nodes.base, self.options.bandwidth)
        except VmRefused as refused:
            raise self.not_started(refused.reason) from refused
        self.untouched = False

    def _ended_early(self) -> LiveMergeFailed:
        """Libvirt does not tell why a job has failed."""
        why = "see its log and QEMU's"
        if self.headroom.is_full:
            why = f"{self.base} of {self.headroom.volume.size} bytes is full"
        return self.failed(f"libvirt's block commit ended early ({why})")

    def _is_merged_soon(self) -> bool:
        """Whether a job has ended well. libvirt describes the chain some time after its end."""
        for _ in range(_LOOKS_FOR_THE_CHAIN):
            if self.nodes().is_merged:
                return True
            if self.disk.block_job() is not None:
                return False
            self.wait()
        return False

    def _switch(self) -> None:
        """Have the guest go on with base. It is suspended from before both are the same."""
        started = time.monotonic()
        self.announce(Stage.BITMAPS)
        if not self.disk.is_suspended():
            self.note(guest_to_resume=True)
            self.disk.suspend()
        self._wait_until_caught_up()
        self.enter_switching()
        self.disk.pivot()
        self._let_guest_run()
        self.held_seconds = time.monotonic() - started

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

    # The end

    def close_merged(self) -> None:
        """Libvirt closes merged images by itself."""

    def verify_bitmaps(self, nodes: MergeNodes) -> Iterator[str]:
        for kept in self.journal.kept:
            # In an internal merge images above can lack it, and then nobody could use it before.
            if self.journal.is_active and not self.disk.passes(kept.name):
                raise self.differs(f"libvirt does not accept bitmap {kept.name!r} as valid")
        gone = set(self._names_to_remove())
        left = gone & set(self.disk.stored_names(nodes.base))
        if left and not self.journal.is_active:
            raise self.differs(f"bitmap {min(left)!r} is still there")
        yield (
            f"bitmaps of base: {len(self.journal.kept)} kept, "
            f"{len(gone)} stale ones removed from the chain"
        )

    def final_bitmaps(self, base: BlockNode) -> tuple[BitmapResult, ...]:
        """Base's bitmaps; those included that it has not stored yet, and that were found sound."""
        unstored = (
            BitmapResult(kept.name, BitmapState.VALID, kept.granularity, None)
            for kept in self.journal.kept
            if base.bitmap(kept.name) is None
        )
        return (*base.bitmap_results(), *unstored)

    def verify_stored(
        self,
        base: Qcow2Image,
        kept: Sequence[StoredBitmap],
        tombstones: Sequence[StoredBitmap],  # noqa: ARG002  # libvirt leaves none
    ) -> str:
        """Have base's cover what they have to hold: they record what is copied, in clusters."""
        return verify_bitmaps_cover(base, kept)
