# SPDX-License-Identifier: Apache-2.0
"""A live merge that is driven over a VM's monitor, command by command.

A loop: look at the journal, the job and the chain; let :mod:`chainmerge.live.qmp.steps` say what
is next; do it. docs/live-merge.md has the order of the steps, and what a death in each leaves.
What each direction has for itself is in :mod:`chainmerge.live.qmp.commit_driver` and
:mod:`chainmerge.live.qmp.pull_driver`.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from chainmerge.documents.progress import Stage
from chainmerge.errors import ChainmergeError
from chainmerge.live.driver import GIVEN_UP, LiveDriver
from chainmerge.live.errors import VmRefused
from chainmerge.live.port import JobPhase, JobState, LiveVm
from chainmerge.live.qmp.steps import LiveStep, Situation, next_step
from chainmerge.merging.verifying import verify_bitmaps
from chainmerge.records.live_journal import LiveState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from chainmerge.engines.metadata.bitmap_set import StoredBitmap
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
    _is_paced: bool = False
    """Whether the job goes as fast as this run was told, and not an earlier one."""

    def __post_init__(self) -> None:
        """Say what each step is."""
        super().__post_init__()
        self._actions: Mapping[LiveStep, Callable[[], None]] = {
            LiveStep.START: self._start,
            LiveStep.PAUSE: self._pause,
            LiveStep.PREPARE: self._prepare,
            LiveStep.RELEASE: self._release,
            LiveStep.FOLLOW: self._follow,
            LiveStep.MAKE_ROOM: self._make_room,
            LiveStep.GIVE_UP: self._fail,
            LiveStep.COMPLETE: self._complete,
            LiveStep.SWITCH: self._switch,
            LiveStep.WAIT: self.wait,
            LiveStep.DISMISS: self._dismiss,
            LiveStep.UNDO: self._undo,
        }

    # What each direction has for itself

    @abstractmethod
    def _start(self) -> None:
        """Start the job.

        Raises LiveNotStarted, LiveMergeFailed.
        """

    @abstractmethod
    def _prepare(self) -> None:
        """Have the bitmaps as they are to be while data is copied, and let the job go on."""

    @abstractmethod
    def _switch(self) -> None:
        """Have the bitmaps as they are to be afterwards, and let what the job did take effect."""

    @abstractmethod
    def _undo(self) -> None:
        """Have everything as it was, and end the job."""

    @abstractmethod
    def _restored(self) -> ChainmergeError:
        """See that everything is as it was: the job is gone, and the chain is not merged.

        Returns the reason why, to be raised.
        """

    @abstractmethod
    def _complete_effect(self) -> None:
        """See to what does not come with the end of the job by itself.

        Raises LiveVerificationFailed.
        """

    def until_merged(self) -> None:
        while True:
            step = next_step(self._look())
            if step is LiveStep.SETTLE:
                self._complete_effect()
                return
            if step is LiveStep.RESTORE:
                raise self._restored()
            try:
                self._actions[step]()
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

    def _pause(self) -> None:
        # It may come to its end in the meantime, which is as good.
        with contextlib.suppress(VmRefused):
            self.disk.pause(self.journal.job)
        self._wait_while(JobPhase.RUNNING, JobPhase.READY)

    def _release(self) -> None:
        self.stop_if_asked()
        if self._looked_at_job().phase is JobPhase.PAUSED:
            self._pace()
            self.disk.resume(self.journal.job)

    def _follow(self) -> None:
        """One look at a job that copies, or at one that is ready and has been told to end."""
        self.announce(Stage.COPY)
        if not self._is_paced and self.options.bandwidth is not None:
            # It may have come to its end in the meantime.
            with contextlib.suppress(VmRefused):
                self._pace()
        self.follow(self._looked_at_job())

    def _pace(self) -> None:
        self.disk.limit(self.journal.job, self.options.bandwidth)
        self._is_paced = True

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
        self._pace()
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

    def _dismiss(self) -> None:
        error = self._looked_at_job().error
        if self._failure is None and (error or self.journal.state is LiveState.UNDOING):
            self._failure = self.failed(error or "an earlier run had given it up")
        if error:
            # It took no effect, and once it is dismissed nothing would tell.
            self.enter(LiveState.UNDOING)
        self.disk.dismiss(self.journal.job)

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
        # What a pull has left as it was others may go on using.
        told = self.journal.delete or not self.journal.pulls
        for node in self.merged_nodes(self.disk.layout()).still_open:
            # Each that is closed sets free what it stood on, which may be gone with it.
            graph = self.disk.layout()
            if node.name not in graph.nodes:
                continue
            filters = graph.idle_filters_on(graph.nodes[node.name])
            try:
                for unused in (*filters, node):
                    self.disk.forget_node(unused.name)
                self._close_file_of(node)
            except VmRefused as refused:
                if told:
                    self.warnings.append(
                        f"the VM keeps {node.filename or node.name} open: {refused.reason}"
                    )

    def _close_file_of(self, node: BlockNode) -> None:
        """Have the VM close what a node that is gone stood on, if it was made as a node of its own.

        Until then the space of a file is not free, and a volume cannot be removed.
        """
        file = self.disk.layout().nodes.get(node.file or "")
        if file is not None and not file.users:
            self.disk.forget_node(file.name)

    def verify_stored(
        self, result: Qcow2Image, kept: Sequence[StoredBitmap], tombstones: Sequence[StoredBitmap]
    ) -> str:
        return verify_bitmaps(result, (*kept, *tombstones))
