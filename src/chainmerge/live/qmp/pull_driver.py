# SPDX-License-Identifier: Apache-2.0
"""A pull that is driven over a VM's monitor: what top lacks comes up by ``block-stream``.

QEMU's job writes what it copies past the dirty bitmaps, if it is given top's own node and not a
filter over it. So top's bitmaps go on recording what the guest writes, and nothing else. Those of
the images below are united with them while the job is held: until it takes effect a checkpoint is
the union of all images in any case, and afterwards it is that of top and what top stands on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chainmerge.documents.progress import Stage
from chainmerge.errors import ChainmergeError
from chainmerge.live.errors import VmRefused
from chainmerge.live.port import JobPhase, PullOrder
from chainmerge.live.pull_record import forget_pull, record_live_pull
from chainmerge.live.qmp.bitmap_actions import faults, pull_actions, switch_off_actions
from chainmerge.live.qmp.driver import MonitorDriver
from chainmerge.records.live_journal import LiveState, forget_live_journal

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.live.merge_nodes import MergeNodes
    from chainmerge.live.nodes import BlockNode


@dataclass(kw_only=True)
class PullDriver(MonitorDriver):
    """A pull that is driven over the VM's monitor."""

    def _start(self) -> None:
        self.stop_if_asked()
        nodes = self.nodes()
        self.announce(Stage.COPY)
        order = PullOrder(
            job=self.journal.job,
            top=nodes.result.name,
            # With the filters that lie on it, which it keeps.
            onto=nodes.merged[0].backing,
            backing_name=self.journal.backing_name,
            lacks_format_node=nodes.below is not None and nodes.below.lacks_format_node,
        )
        try:
            self.disk.start_pull(order)
        except VmRefused as refused:
            raise self.not_started(refused.reason) from refused
        self._pause()

    def _prepare(self) -> None:
        self.enter(LiveState.COPYING)
        self._release()

    def _switch(self) -> None:
        """The guest goes on all the time, and what it writes is recorded before and after."""
        self.announce(Stage.BITMAPS)
        nodes = self.nodes()
        try:
            self._unite(nodes.result, nodes.merged)
        except VmRefused as refused:
            raise self.failed(refused.reason) from refused
        self.stop_if_asked()
        try:
            # Top's header is about to lose what shows that there was something to pull.
            record_live_pull(self.journal)
            self.enter(LiveState.SWITCHING)
        except ChainmergeError as error:
            raise self.failed(error.sentence) from error
        self.disk.finalize(self.journal.job)
        self._wait_while(JobPhase.HELD, JobPhase.ENDING)

    def _unite(self, top: BlockNode, merged: Sequence[BlockNode]) -> None:
        """Have top's bitmaps as they are to be; raises VmRefused."""
        if len(merged) < len(self.journal.merged):
            raise VmRefused(self.disk.name, "transaction", "the VM has closed images already")
        for actions in pull_actions(self.journal, top, merged):
            self.disk.change_bitmaps(actions)

    def _undo(self) -> None:
        self.disk.cancel(self.journal.job)
        self._wait_while(
            JobPhase.RUNNING, JobPhase.PAUSED, JobPhase.READY, JobPhase.HELD, JobPhase.ENDING
        )

    def _restored(self) -> ChainmergeError:
        """As it is said there. Bits that were united stay: the checkpoint is the union anyway."""
        reason = "the job has failed (see QEMU's log) or was cancelled, or the VM was restarted"
        failure = self._failure or self.failed(reason)
        self.enter(LiveState.UNDOING)
        self.let_guest_go()
        forget_pull(self.journal)
        if self._has_lost_bitmaps():
            # Another QEMU has found them as a dead one left them. A cold merge restores them.
            forget_live_journal(Path(self.result))
        else:
            self.forget_records()
        return failure

    def _has_lost_bitmaps(self) -> bool:
        top = self.nodes().result
        found = (top.bitmap(kept.name) for kept in self.journal.kept)
        return any(bitmap is not None and bitmap.inconsistent for bitmap in found)

    def _complete_effect(self) -> None:
        """Unite the bitmaps if somebody else has let the job take effect before that was done.

        Else a checkpoint would look complete without what the images below had of it.
        """
        if self.journal.took_effect:
            return
        nodes = self.nodes()
        try:
            self._unite(nodes.result, nodes.still_open[::-1])
        except VmRefused as refused:
            self.disk.change_bitmaps(switch_off_actions(self.journal, nodes.result))
            raise self.differs(
                "the job took effect before its bitmaps were united with those of the images "
                f"below, which cannot be done any more ({refused.reason}): they are switched off"
            ) from refused

    def verify_bitmaps(self, nodes: MergeNodes) -> Iterator[str]:
        for fault in faults(self.journal, nodes.result):
            raise self.differs(fault)
        yield (
            f"bitmaps of top, as the VM says: {len(self.journal.kept)} kept and recording, "
            f"{len(self.journal.stale)} stale ones removed"
        )
