# SPDX-License-Identifier: Apache-2.0
"""A live merge in a domain of libvirt.

libvirt's jobs copy, unite the bitmaps, move the domain's description along and close merged
images; we see to what comes before and after it. Stale bitmaps go first, while no job is in the
way. What each direction has for itself is in :mod:`chainmerge.live.libvirt.commit_driver` and
:mod:`chainmerge.live.libvirt.pull_driver`. docs/live-merge.md has the order, and what a death in
each step leaves.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from chainmerge.bitmaps.rules import BitmapState
from chainmerge.documents.bitmaps import BitmapResult
from chainmerge.documents.progress import Stage
from chainmerge.live.driver import GIVEN_UP, LiveDriver
from chainmerge.live.errors import LiveMergeFailed, VmRefused
from chainmerge.live.libvirt.disk import DomainDisk, DomainJob
from chainmerge.live.port import JobPhase, JobState
from chainmerge.merging.verifying import verify_bitmaps_cover
from chainmerge.records.live_journal import LiveState

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.engines.metadata.bitmap_set import StoredBitmap
    from chainmerge.live.merge_nodes import MergeNodes
    from chainmerge.live.nodes import BlockNode
    from chainmerge.qcow2.image import Qcow2Image

_LOOKS_FOR_THE_CHAIN: Final = 40


@dataclass(kw_only=True)
class DomainDriver(LiveDriver[DomainDisk]):
    """A live merge that is driven through libvirt."""

    VM: ClassVar[str] = "the domain"
    TELLER: ClassVar[str] = "libvirt"

    _is_paced: bool = False
    """Whether the job goes as fast as this run was told, and not an earlier one."""

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
            self._before_the_job()
            self.enter(LiveState.COPYING)
        self._carry_out(begun=begun)

    # What each direction has for itself

    def _before_the_job(self) -> None:
        """Do what has to be done before the job is started for the first time."""

    @abstractmethod
    def _carry_out(self, *, begun: bool) -> None:
        """Have the job run, and take effect.

        Args:
            begun: Whether a job may have been started before, and ended in the meantime.
        """

    @abstractmethod
    def _is_ours(self, job: DomainJob) -> bool:
        """Whether a job is of the kind that this merge has."""

    @abstractmethod
    def _start(self) -> None:
        """Start the job.

        Raises LiveNotStarted, LiveMergeFailed.
        """

    def _is_caught_up(self, job: DomainJob) -> bool:  # noqa: ARG002  # such a job has an end
        """Whether a job waits for us, with everything copied."""
        return False

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
        if job is not None and self._is_ours(job):
            # It may have ended by itself in between.
            with contextlib.suppress(VmRefused):
                self.disk.cancel()
                return self.nodes().is_merged
        return self._is_merged_soon()

    def _undo(self) -> None:
        """Have everything as it was, but for the stale bitmaps."""
        self.enter(LiveState.UNDOING)
        self.let_guest_go()
        # Nothing but the journal knows them. As long as libvirt does not take them, it stays.
        self._define_checkpoints_of_others()
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
                left = self.disk.checkpoint_of_others(name)
                if left is not None:
                    self.note(checkpoints={**self.journal.checkpoints, name: left})
                self.disk.remove_everywhere(name)
        self._define_checkpoints_of_others()

    def _define_checkpoints_of_others(self) -> None:
        """Have libvirt know again what it has forgotten with the bitmaps of this disk."""
        for described in self.journal.checkpoints.values():
            self.disk.define_checkpoint_again(described)
        if self.journal.checkpoints:
            self.note(checkpoints={})

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
                begun = self._is_paced = True
                continue
            if not self._is_ours(job):
                raise self.failed(f"another block job ({job.kind}) runs on this disk")
            if self._is_caught_up(job):
                self.copied = job.done
                return
            self._pace()
            self.follow(JobState(JobPhase.RUNNING, job.done, job.total))

    def _pace(self) -> None:
        if not self._is_paced and self.options.bandwidth is not None:
            # It may have come to its end in the meantime.
            with contextlib.suppress(VmRefused):
                self.disk.limit_job(self.options.bandwidth)
            self._is_paced = True

    def _ended_early(self) -> LiveMergeFailed:
        """Libvirt does not tell why a job has failed."""
        why = "see its log and QEMU's"
        if self.headroom.is_full:
            why = f"{self.result} of {self.headroom.volume.size} bytes is full"
        return self.failed(f"libvirt's job ended early ({why})")

    def _is_merged_soon(self) -> bool:
        """Whether a job has ended well. libvirt describes the chain some time after its end."""
        for _ in range(_LOOKS_FOR_THE_CHAIN):
            if self.nodes().is_merged:
                return True
            if self.disk.block_job() is not None:
                return False
            self.wait()
        return False

    # The end

    def close_merged(self) -> None:
        """Libvirt closes merged images by itself."""

    def verify_bitmaps(self, nodes: MergeNodes) -> Iterator[str]:
        for kept in self.journal.kept:
            # In an internal merge images above can lack it, and then nobody could use it before.
            if self.journal.is_active and not self.disk.passes(kept.name):
                raise self.differs(f"libvirt does not accept bitmap {kept.name!r} as valid")
        gone = set(self._names_to_remove())
        left = gone & set(self.disk.stored_names(nodes.result))
        if left and not self.journal.is_active:
            raise self.differs(f"bitmap {min(left)!r} is still there")
        yield (
            f"bitmaps of {'top' if self.journal.pulls else 'base'}: {len(self.journal.kept)} kept, "
            f"{len(gone)} stale ones removed from the chain"
        )

    def final_bitmaps(self, result: BlockNode) -> tuple[BitmapResult, ...]:
        """Its bitmaps; those included that it has not stored yet, and that were found sound."""
        unstored = (
            BitmapResult(kept.name, BitmapState.VALID, kept.granularity, None)
            for kept in self.journal.kept
            if result.bitmap(kept.name) is None
        )
        return (*result.bitmap_results(), *unstored)

    def verify_stored(
        self,
        result: Qcow2Image,
        kept: Sequence[StoredBitmap],
        tombstones: Sequence[StoredBitmap],  # noqa: ARG002  # libvirt leaves none
    ) -> str:
        """Have base's cover what they have to hold: they record what is copied, in clusters."""
        return verify_bitmaps_cover(result, kept)
