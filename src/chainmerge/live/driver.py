# SPDX-License-Identifier: Apache-2.0
"""A live merge in the hands of a process, whichever way the VM is reached.

Keeping records, looking after the copy, keeping room for it, and slowing the guest down are the
same for every VM, and stand here. How the VM is brought to merge, and what it tells of its
bitmaps afterwards, is up to each port: :mod:`chainmerge.live.qmp.driver`,
:mod:`chainmerge.live.libvirt.driver`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, TypeVar

import msgspec
from msgspec import Struct

from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.errors import ChainmergeError, Interrupted
from chainmerge.live.convergence import Convergence, Remedy
from chainmerge.live.errors import (
    LiveChainDiffers,
    LiveMergeFailed,
    LiveMergeStalled,
    LiveNotStarted,
    LiveVerificationFailed,
    VmLost,
    VmRefused,
    VmUnreachable,
)
from chainmerge.live.headroom import Headroom
from chainmerge.live.merge_nodes import MergeNodes, find_merge_nodes
from chainmerge.live.port import DiskLimits, MergingDisk
from chainmerge.options import LiveOptions
from chainmerge.records.changes import data_changed
from chainmerge.records.identity import may_be_same
from chainmerge.records.live_journal import (
    LiveJournal,
    LiveState,
    SavedLimits,
    enter,
    forget_live_journal,
    save_live_journal,
)
from chainmerge.records.request import command_of, resume_command_of
from chainmerge.records.saved_bitmaps import forget_saved_bitmaps, load_saved_bitmaps
from chainmerge.storage.volumes import volume_at

if TYPE_CHECKING:
    from chainmerge.documents.bitmaps import BitmapResult
    from chainmerge.engines.metadata.bitmap_set import StoredBitmap
    from chainmerge.live.nodes import BlockGraph, BlockNode
    from chainmerge.live.port import JobState
    from chainmerge.qcow2.image import Qcow2Image

# Events make it shorter; this is how often progress is looked at.
SECONDS_BETWEEN_LOOKS: Final = 0.25

GIVEN_UP: Final = (LiveNotStarted, LiveMergeFailed, LiveMergeStalled, Interrupted)
"""Why a merge is undone."""

DiskT = TypeVar("DiskT", bound=MergingDisk)


class Caller(Struct, frozen=True):
    """Who asked for a merge.

    Attributes:
        report: Told of progress.
        should_stop: Asked whether to stop.
        started: When it was asked for, by ``time.monotonic``.
    """

    report: Callable[[ProgressEvent], None]
    should_stop: Callable[[], bool]
    started: float


@dataclass(kw_only=True)
class LiveDriver(ABC, Generic[DiskT]):
    """A live merge that is driven by this process.

    Attributes:
        disk: The disk of the VM.
        journal: As it is on disk.
        options: How to merge.
        caller: Who asked for it.
        untouched: Whether neither base's volume nor any bitmap was changed yet.
        copied: Guest bytes that were copied.
        held_seconds: How long the guest waited for the merge to take effect.
        warnings: What the user should know, a sentence each.
    """

    VM: ClassVar[str]
    """What sentences call the VM."""
    TELLER: ClassVar[str]
    """Who tells what the VM has."""

    disk: DiskT
    journal: LiveJournal
    options: LiveOptions
    caller: Caller
    untouched: bool = False
    copied: int = 0
    held_seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    _announced: set[Stage] = field(default_factory=set)
    _headroom: Headroom | None = None

    def __post_init__(self) -> None:
        """Begin to watch whether the copy catches up with the guest."""
        self._convergence = Convergence(self.options.on_stall, self.options.deadline)

    # What each port has for itself

    @abstractmethod
    def until_merged(self) -> None:
        """Bring the VM to where the merge has taken effect, from wherever it is.

        Raises:
            LiveMergeFailed, LiveMergeStalled, LiveNotStarted, Interrupted: it was undone.
            VmUnreachable: the VM does not answer any more.
        """

    @abstractmethod
    def close_merged(self) -> None:
        """See that the VM does not have the merged images open any more."""

    @abstractmethod
    def verify_bitmaps(self, nodes: MergeNodes) -> Iterator[str]:
        """Have the VM say that the result's bitmaps are as planned; yields what was found.

        Raises LiveVerificationFailed.
        """

    @abstractmethod
    def verify_stored(
        self, result: Qcow2Image, kept: Sequence[StoredBitmap], tombstones: Sequence[StoredBitmap]
    ) -> str:
        """Compare the result's bitmaps on disk with what it has to hold; returns what was found.

        Raises VerificationFailed.
        """

    def final_bitmaps(self, result: BlockNode) -> tuple[BitmapResult, ...]:
        """Its bitmaps, for the report of a merge that was verified."""
        return result.bitmap_results()

    def let_guest_go(self) -> None:
        """Put back what the guest's disk was limited to, or warn that this cannot be done."""
        saved = self.journal.limits
        if saved is None:
            return
        try:
            self.disk.limit_disk(DiskLimits(saved.limits, saved.group))
        except VmRefused as refused:
            self.warnings.append(
                "the guest's disk may still be slowed down: its limits could not be restored: "
                f"{refused.reason}"
            )
        self.note(limits=None)

    # Records

    def announce(self, stage: Stage) -> None:
        """Report that a stage begins, the first time."""
        if stage not in self._announced:
            self._announced.add(stage)
            self.caller.report(ProgressEvent(stage))

    def enter(self, state: LiveState) -> None:
        """Record that what *state* names begins."""
        self.journal = enter(self.journal, state)

    def enter_switching(self) -> None:
        """Record that base is right from here on, and by what a change of top is told."""
        if self.journal.state is not LiveState.SWITCHING:
            since = data_changed(Path(self.top))
            self.journal = msgspec.structs.replace(self.journal, top_since=since)
        self.enter(LiveState.SWITCHING)

    def note(self, **changed: Any) -> None:  # fields of the journal
        """Record what has changed."""
        self.journal = msgspec.structs.replace(self.journal, **changed)
        save_live_journal(self.journal)

    def forget_records(self) -> None:
        """Remove what the merge has left beside the image that it has written."""
        result = Path(self.result)
        saved = load_saved_bitmaps(result)
        if saved is not None and may_be_same(saved.base, self.journal.result):
            forget_saved_bitmaps(result)
        forget_live_journal(result)

    @property
    def top(self) -> str:
        """Top's path."""
        return self.journal.top.path

    @property
    def base(self) -> str:
        """Base's path."""
        return self.journal.base.path

    @property
    def result(self) -> str:
        """The path of the image that is written."""
        return self.journal.result.path

    # Where the images are

    def nodes(self) -> MergeNodes:
        """Where the images stand now.

        Raises LiveChainDiffers.
        """
        return self._nodes_in(self.disk.layout())

    def _nodes_in(self, graph: BlockGraph) -> MergeNodes:
        nodes = find_merge_nodes(graph, self.journal)
        if nodes is None:
            difference = f"{self.result} is not in {self.VM}'s chain any more"
            raise LiveChainDiffers(self.disk.name, difference)
        return nodes

    def merged_nodes(self, graph: BlockGraph) -> MergeNodes:
        """Where the images stand in *graph*, once the merge has taken effect.

        Raises LiveVerificationFailed.
        """
        nodes = find_merge_nodes(graph, self.journal)
        if nodes is None or not nodes.is_merged:
            raise self.differs(f"{self.VM}'s chain is not the merged one")
        return nodes

    # The copy

    def follow(self, job: JobState) -> None:
        """Look after a job that copies, and wait until it is worth another look.

        Raises:
            Interrupted: the caller wants to stop.
            LiveMergeFailed: there is no room, or the guest cannot be slowed down.
            LiveMergeStalled: the copy does not catch up.
        """
        self.copied = job.done
        self._convergence.observe(job)
        rate = int(self._convergence.rate)
        self.caller.report(ProgressEvent(Stage.COPY, job.done, job.total, rate))
        self.stop_if_asked()
        try:
            self.headroom.keep()
        except VmUnreachable:
            raise
        except ChainmergeError as error:
            raise self.failed(error.sentence) from error
        if self.journal.is_active:
            self._catch_up(job)
        self.disk.rest(SECONDS_BETWEEN_LOOKS)

    def wait(self) -> None:
        """Wait until something may have happened."""
        self.disk.wait_for_event(SECONDS_BETWEEN_LOOKS)

    def stop_if_asked(self) -> None:
        """Raise Interrupted where the caller wants to stop."""
        if self.caller.should_stop():
            raise self.interrupted()

    @property
    def headroom(self) -> Headroom:
        """The room for what is copied."""
        if self._headroom is None:
            volume = volume_at(Path(self.result), self.options.as_merge)
            graph = self.disk.layout()
            protocol = graph.protocol_of(self._nodes_in(graph).result)
            assert protocol is not None
            self._headroom = Headroom(self.disk, protocol.name, volume)
        return self._headroom

    @property
    def extensions(self) -> int:
        """How often the volume that is written was extended while data was copied."""
        return 0 if self._headroom is None else self._headroom.extensions

    def _catch_up(self, job: JobState) -> None:
        match self._convergence.judge(job):
            case Remedy.ABORT:
                remaining = max(job.total - job.done, 0)
                seconds = self._convergence.seconds
                raise LiveMergeStalled(self.base, self.top, remaining, seconds)
            case Remedy.THROTTLE:
                try:
                    self._slow_guest_down()
                except VmRefused as refused:
                    reason = f"the guest cannot be slowed down: {refused.reason}"
                    raise self.failed(reason) from refused
            case Remedy.NOTHING:
                pass

    def _slow_guest_down(self) -> None:
        """Limit what the guest writes; what it was limited to before is recorded first."""
        limit = self._convergence.limit
        assert limit is not None
        now = self.disk.disk_limits()
        if self.journal.limits is None:
            self.note(limits=SavedLimits(dict(now.limits), now.group))
        self.disk.limit_disk(now.slowed_to(limit))

    # What went wrong

    def failed(self, reason: str) -> LiveMergeFailed:
        """The error of a merge that did not come about."""
        return LiveMergeFailed(self.disk.name, self.base, self.top, reason)

    def not_started(self, reason: str) -> LiveNotStarted | LiveMergeFailed:
        """The error for a job that the VM did not begin."""
        if self.untouched:
            return LiveNotStarted(self.disk.name, self.base, self.top, reason)
        return self.failed(reason)

    def interrupted(self) -> Interrupted:
        """The error of a merge that is undone because the caller wants to stop."""
        pruned = "; stale bitmaps that were pruned stay removed" if self.journal.stale else ""
        return Interrupted(
            f"the merge in {self.disk.name} was undone: it reads {self.top} as before{pruned}"
        )

    def differs(self, difference: str) -> LiveVerificationFailed:
        """The error of a merge that took effect, and its result is not as planned."""
        return LiveVerificationFailed(self.result, difference)

    def lost(self, reason: str) -> VmLost:
        """The error for a VM that went away, with what to run next."""
        request = self.journal.known_request
        resume = resume_command_of(request, self.disk.address)
        cold = command_of(request) or "the same merge without `live`"
        return VmLost(self.disk.name, self.base, self.top, reason, resume, cold)
