# SPDX-License-Identifier: Apache-2.0
"""A live merge that is driven over a VM's monitor, command by command.

A loop: look at the journal, the job and the chain; let :mod:`chainmerge.live.qmp.steps` say what
is next; do it. docs/live-merge.md has the order of the steps, and what a death in each leaves.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Final

from chainmerge.documents.progress import Stage
from chainmerge.errors import ChainmergeError
from chainmerge.live.driver import GIVEN_UP, LiveDriver
from chainmerge.live.errors import LiveMergeFailed, VmRefused
from chainmerge.live.port import CommitOrder, JobPhase, JobState, LiveVm
from chainmerge.live.qmp.bitmap_actions import (
    disable_actions,
    faults,
    switch_actions,
    undo_actions,
    window_actions,
)
from chainmerge.live.qmp.steps import LiveStep, Situation, next_step
from chainmerge.merging.verifying import verify_bitmaps
from chainmerge.planning.pivot import pivot_unclear
from chainmerge.records.changes import data_changed
from chainmerge.records.live_journal import LiveState, forget_live_journal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from chainmerge.engines.metadata.bitmap_set import StoredBitmap
    from chainmerge.live.merge_nodes import MergeNodes
    from chainmerge.live.nodes import BlockNode
    from chainmerge.qcow2.image import Qcow2Image

# Nothing but a few requests is to end; a storage that hangs can keep it waiting.
_ENOUGH_LOOKS: Final = 40


@dataclass(kw_only=True)
class MonitorDriver(LiveDriver[LiveVm]):
    """A live merge that is driven over the VM's monitor."""

    VM: ClassVar[str] = "the VM"
    TELLER: ClassVar[str] = "the VM"

    _failure: ChainmergeError | None = None
    """Why the merge is given up, to be raised once everything is undone."""
    _job: JobState | None = None
    """How the job was at the last look."""
    _stuck_at: int | None = None
    _completing: bool = False

    def until_merged(self) -> None:
        while True:
            step = next_step(self._look())
            if step is LiveStep.SETTLE:
                self._name_base()
                return
            if step is LiveStep.RESTORE:
                raise self._restored()
            try:
                _ACTIONS[step](self)
            except GIVEN_UP as failure:
                self._give_up(failure)

    def _look(self) -> Situation:
        nodes = self.nodes()
        self._job = self.disk.job(self.journal.job)
        if self._job is not None:
            self.copied = self._job.done
        return Situation(self.journal.state, self._job, merged=nodes.is_merged)

    def _give_up(self, failure: ChainmergeError) -> None:
        """From the next step on everything is undone; *failure* is raised in the end."""
        self._failure = failure
        self.enter(LiveState.UNDOING)

    # The steps, each as next_step names it

    def _start(self) -> None:
        """Base is read-only and as it was, but for what an earlier run has switched off."""
        if self.caller.should_stop():
            # What an earlier run has switched off is undone while a job makes base writable.
            self._give_up(self.interrupted())
        nodes = self.nodes()
        self.announce(Stage.PRUNE)
        order = CommitOrder(
            job=self.journal.job,
            root=nodes.root,
            top=nodes.overlays[-1].name,
            base=nodes.base.name,
            backing_name=self.journal.backing_name,
        )
        try:
            self.disk.change_bitmaps(disable_actions(self.journal, nodes.base))
            self.disk.start_commit(order)
        except VmRefused as refused:
            # Nothing is stored of it yet: base has been read-only all the time.
            self.disk.change_bitmaps(undo_actions(self.journal, self.nodes().base))
            raise self.not_started(refused.reason) from refused
        self._pause()

    def _pause(self) -> None:
        # It may come to its end in the meantime, which is as good.
        with contextlib.suppress(VmRefused):
            self.disk.pause(self.journal.job)
        self._wait_while(JobPhase.RUNNING, JobPhase.READY)

    def _prepare(self) -> None:
        self.announce(Stage.PRUNE)
        nodes = self.nodes()
        try:
            for actions in window_actions(self.journal, nodes.base, nodes.overlays):
                self.disk.change_bitmaps(actions)
        except VmRefused as refused:
            raise self.failed(refused.reason) from refused
        self.enter(LiveState.COPYING)
        self._release()

    def _release(self) -> None:
        self.stop_if_asked()
        try:
            self.disk.limit(self.journal.job, self.options.bandwidth)
        except VmRefused:
            # With next to nothing to copy it has come to its end before it was paused.
            job = self.disk.job(self.journal.job)
            if job is not None and job.phase not in (JobPhase.HELD, JobPhase.ENDING, JobPhase.DONE):
                raise
            return
        if self._looked_at_job().phase is JobPhase.PAUSED:
            self.disk.resume(self.journal.job)

    def _follow(self) -> None:
        """One look at a job that copies, or at one that is ready and has been told to end."""
        self.announce(Stage.COPY)
        self.follow(self._looked_at_job())

    def _make_room(self) -> None:
        """The volume is full: extend it, or find out that what was freed since is enough."""
        done = self._looked_at_job().done
        headroom = self.headroom
        try:
            if headroom.grows:
                self.announce(Stage.EXTEND)
                headroom.make_room()
            elif self._stuck_at == done:
                headroom.make_room()
        except ChainmergeError as error:
            raise self.failed(error.sentence) from error
        self._stuck_at = done
        self.stop_if_asked()
        self.disk.limit(self.journal.job, self.options.bandwidth)
        self.disk.resume(self.journal.job)
        self._wait_while(JobPhase.PAUSED)

    def _fail(self) -> None:
        raise self.failed("an image could not be read or written (see QEMU's log)")

    def _complete(self) -> None:
        if self._completing:
            self._follow()
            return
        self.announce(Stage.BITMAPS)
        self._completing = True
        # An earlier run may have asked for it already.
        with contextlib.suppress(VmRefused):
            self.disk.complete(self.journal.job)

    def _switch(self) -> None:
        """From here to the end of the job the guest waits, if it writes to what is merged."""
        started = time.monotonic()
        self.announce(Stage.BITMAPS)
        nodes = self.nodes()
        try:
            self.disk.change_bitmaps(switch_actions(self.journal, nodes.base, nodes.overlays))
        except VmRefused as refused:
            raise self.failed(refused.reason) from refused
        try:
            self.enter_switching()
        except ChainmergeError as error:
            # Whatever else may have to wait, the guest must not.
            self._failure = error
            self._undo()
            return
        self.disk.finalize(self.journal.job)
        self._wait_while(JobPhase.HELD, JobPhase.ENDING)
        self.held_seconds = time.monotonic() - started

    def _dismiss(self) -> None:
        error = self._looked_at_job().error
        if self._failure is None and (error or self.journal.state is LiveState.UNDOING):
            self._failure = self.failed(error or "an earlier run had given it up")
        if error:
            # It took no effect, and once it is dismissed nothing would tell.
            self.enter(LiveState.UNDOING)
        self.disk.dismiss(self.journal.job)

    def _undo(self) -> None:
        """Everything back while base is writable still, then end the job.

        What is under way is waited for first: it would be recorded.
        """
        self._pause()
        self.disk.change_bitmaps(undo_actions(self.journal, self.nodes().base))
        self.disk.cancel(self.journal.job)
        self._wait_while(JobPhase.PAUSED, JobPhase.READY, JobPhase.HELD, JobPhase.ENDING)

    def _restored(self) -> ChainmergeError:
        """The job is gone without the merge: see that base's bitmaps are what they were.

        Returns the reason why, to be raised.
        """
        if self.journal.took_effect and self.journal.is_active:
            # Only another QEMU does not know of the job any more, and it was given top again.
            return pivot_unclear(self.journal.known_request)
        failure = self._failure or self.failed("the job was cancelled, or the VM was restarted")
        self.enter(LiveState.UNDOING)
        self.let_guest_go()
        base = self.nodes().base
        actions = undo_actions(self.journal, base)
        if not actions:
            self._close_again(base)
            self.forget_records()
            return failure
        try:
            if base.read_only:
                self.disk.make_writable(base.name)
            self.disk.change_bitmaps(actions)
            self.disk.make_read_only(base.name)
        except VmRefused as refused:
            # The saved bitmaps stay, and the next merge of these images while they are closed
            # takes base's from there.
            forget_live_journal(Path(self.base))
            names = ", ".join(repr(kept.name) for kept in self.journal.kept)
            why = failure.reason if isinstance(failure, LiveMergeFailed) else failure.sentence
            reason = (
                f"{why}; base's bitmaps {names} could not be switched on again "
                f"({refused.reason}): they are saved beside base, and a cold merge restores them"
            )
            raise self.failed(reason) from failure
        self.forget_records()
        return failure

    def _close_again(self, base: BlockNode) -> None:
        """Make base read-only again, which QEMU forgets of an active commit that was cancelled.

        Where it cannot be told to (a node whose name it made up), base's bitmaps are stored when
        the VM ends.
        """
        if not base.read_only:
            with contextlib.suppress(VmRefused):
                self.disk.make_read_only(base.name)

    def _looked_at_job(self) -> JobState:
        assert self._job is not None
        return self._job

    def _wait_while(self, *phases: JobPhase) -> None:
        """Wait until the job has left these phases; after a while, look again at everything."""
        for _ in range(_ENOUGH_LOOKS):
            job = self.disk.job(self.journal.job)
            if job is None or job.phase not in phases:
                return
            self.wait()

    # The end

    def close_merged(self) -> None:
        """Have the VM close the merged images, the upper ones first."""
        for node in self.merged_nodes(self.disk.layout()).still_open:
            # Each that is closed sets free what it stood on.
            graph = self.disk.layout()
            filters = graph.idle_filters_on(graph.nodes[node.name])
            try:
                for unused in (*filters, node):
                    self.disk.forget_node(unused.name)
            except VmRefused as refused:
                self.warnings.append(
                    f"the VM keeps {node.filename or node.name} open: {refused.reason}"
                )
        # Closing top has changed it. Whatever else does from now on is no doing of this merge.
        self.note(top_since=data_changed(Path(self.top)))

    def _name_base(self) -> None:
        """Have the image above name base, where QEMU did not: it stops at a filter between them."""
        graph, name = self.disk.layout(), self.journal.backing_name
        nodes = self.merged_nodes(graph)
        if nodes.above is not None and name is not None and graph.has_filter_below(nodes.above):
            # Whether it does is looked at before anything is deleted.
            with contextlib.suppress(VmRefused):
                self.disk.name_backing_file(nodes.root, nodes.above.name, name)

    def verify_bitmaps(self, nodes: MergeNodes) -> Iterator[str]:
        for fault in faults(self.journal, nodes.base):
            raise self.differs(fault)
        yield (
            f"bitmaps of base, as the VM says: {len(self.journal.kept)} kept and recording, "
            f"{len(self.journal.stale)} stale ones removed"
        )

    def verify_stored(
        self, base: Qcow2Image, kept: Sequence[StoredBitmap], tombstones: Sequence[StoredBitmap]
    ) -> str:
        return verify_bitmaps(base, (*kept, *tombstones))


_ACTIONS: Final[Mapping[LiveStep, Callable[[MonitorDriver], None]]] = MappingProxyType(
    {
        LiveStep.START: MonitorDriver._start,
        LiveStep.PAUSE: MonitorDriver._pause,
        LiveStep.PREPARE: MonitorDriver._prepare,
        LiveStep.RELEASE: MonitorDriver._release,
        LiveStep.FOLLOW: MonitorDriver._follow,
        LiveStep.MAKE_ROOM: MonitorDriver._make_room,
        LiveStep.GIVE_UP: MonitorDriver._fail,
        LiveStep.COMPLETE: MonitorDriver._complete,
        LiveStep.SWITCH: MonitorDriver._switch,
        LiveStep.WAIT: MonitorDriver.wait,
        LiveStep.DISMISS: MonitorDriver._dismiss,
        LiveStep.UNDO: MonitorDriver._undo,
    }
)
