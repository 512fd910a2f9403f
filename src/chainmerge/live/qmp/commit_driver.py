# SPDX-License-Identifier: Apache-2.0
"""A commit that is driven over a VM's monitor: top goes down into base by ``block-commit``."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chainmerge.documents.progress import Stage
from chainmerge.errors import ChainmergeError
from chainmerge.live.errors import LiveMergeFailed, VmRefused
from chainmerge.live.inspection import WITHOUT_GUEST
from chainmerge.live.port import CommitOrder, JobPhase
from chainmerge.live.qmp.bitmap_actions import (
    disable_actions,
    faults,
    switch_actions,
    undo_actions,
    window_actions,
)
from chainmerge.live.qmp.driver import MonitorDriver
from chainmerge.planning.pivot import pivot_unclear
from chainmerge.records.changes import data_changed
from chainmerge.records.live_journal import LiveState, forget_live_journal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.live.merge_nodes import MergeNodes
    from chainmerge.live.nodes import BlockNode


@dataclass(kw_only=True)
class CommitDriver(MonitorDriver):
    """A commit that is driven over the VM's monitor."""

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
            top=nodes.merged[-1].name,
            base=nodes.result.name,
            backing_name=self.journal.backing_name,
            lacks_format_node=nodes.result.lacks_format_node,
        )
        try:
            self.disk.change_bitmaps(disable_actions(self.journal, nodes.result))
            self.disk.start_commit(order)
        except VmRefused as refused:
            # Nothing is stored of it yet: base has been read-only all the time.
            self.disk.change_bitmaps(undo_actions(self.journal, self.nodes().result))
            raise self.not_started(refused.reason) from refused
        self._pause()

    def _prepare(self) -> None:
        self.announce(Stage.PRUNE)
        nodes = self.nodes()
        try:
            for actions in window_actions(self.journal, nodes.result, nodes.merged):
                self.disk.change_bitmaps(actions)
        except VmRefused as refused:
            raise self.failed(refused.reason) from refused
        self.enter(LiveState.COPYING)
        self._release()

    def _switch(self) -> None:
        """From here to the end of the job the guest waits, if it writes to what is merged."""
        started = time.monotonic()
        self.announce(Stage.BITMAPS)
        graph = self.disk.layout()
        nodes = self._nodes_in(graph)
        if self.journal.is_active and not graph.is_read(nodes.active):
            raise self.failed(WITHOUT_GUEST)
        try:
            self.disk.change_bitmaps(switch_actions(self.journal, nodes.result, nodes.merged))
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

    def _undo(self) -> None:
        """Everything back while base is writable still, then end the job.

        What is under way is waited for first: it would be recorded.
        """
        self._pause()
        self.disk.change_bitmaps(undo_actions(self.journal, self.nodes().result))
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
        base = self.nodes().result
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

    def _complete_effect(self) -> None:
        """Have the image above name base, where QEMU did not: it stops at a filter between them."""
        graph, name = self.disk.layout(), self.journal.backing_name
        nodes = self.merged_nodes(graph)
        if nodes.above is not None and name is not None and graph.has_filter_below(nodes.above):
            # Whether it does is looked at before anything is deleted.
            with contextlib.suppress(VmRefused):
                self.disk.name_backing_file(nodes.root, nodes.above.name, name)

    def verify_bitmaps(self, nodes: MergeNodes) -> Iterator[str]:
        for fault in faults(self.journal, nodes.result):
            raise self.differs(fault)
        yield (
            f"bitmaps of base, as the VM says: {len(self.journal.kept)} kept and recording, "
            f"{len(self.journal.stale)} stale ones removed"
        )

    def close_merged(self) -> None:
        super().close_merged()
        # Closing top has changed it. Whatever else does from now on is no doing of this merge.
        self.note(top_since=data_changed(Path(self.top)))
