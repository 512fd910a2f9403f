# SPDX-License-Identifier: Apache-2.0
"""A pull in a domain of libvirt: what the active image lacks comes up by its block pull.

libvirt unites the bitmaps by itself once the job has ended, and before it describes the chain as
it is then. The job takes effect by itself, so that the record of the pull is there before it
begins.
"""

from __future__ import annotations

from dataclasses import dataclass

from chainmerge.live.errors import VmRefused
from chainmerge.live.libvirt.disk import DomainJob, DomainJobKind
from chainmerge.live.libvirt.driver import DomainDriver
from chainmerge.live.pull_record import forget_pull, record_live_pull


@dataclass(kw_only=True)
class DomainPullDriver(DomainDriver):
    """A pull that is driven through libvirt."""

    def _before_the_job(self) -> None:
        record_live_pull(self.journal)

    def _carry_out(self, *, begun: bool) -> None:
        self._copy(begun=begun)

    def _undo(self) -> None:
        super()._undo()
        forget_pull(self.journal)

    def _is_ours(self, job: DomainJob) -> bool:
        return job.kind is DomainJobKind.PULL

    def _start(self) -> None:
        try:
            self.disk.start_pull(self.nodes().below, self.options.bandwidth)
        except VmRefused as refused:
            raise self.not_started(refused.reason) from refused
        self.untouched = False
