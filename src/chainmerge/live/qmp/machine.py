# SPDX-License-Identifier: Apache-2.0
"""A running VM with all its disks, by its QMP socket."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.live.qmp.block_graph import GraphEdges, guest_disks
from chainmerge.live.qmp.leftovers import VmState
from chainmerge.live.qmp.monitor import Monitor
from chainmerge.live.qmp.named_nodes import nodes_told
from chainmerge.live.qmp.vm import DEFAULT_HOLD_SECONDS, QmpVm

if TYPE_CHECKING:
    from typing import Self

    from chainmerge.live.port import GuestDisk


class QmpMachine:
    """A running VM by its QMP socket; a context manager.

    QEMU serves one client of a monitor at a time, so its disks share one connection.

    Args:
        socket: path of the socket.
        monitor_hold: as of :class:`QmpVm`.

    Raises VmUnreachable.
    """

    def __init__(self, socket: str, *, monitor_hold: float = DEFAULT_HOLD_SECONDS) -> None:
        self._monitor = Monitor(socket, monitor_hold)

    def __enter__(self) -> Self:
        """Return the VM itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Disconnect; the VM goes on with whatever it does."""
        self._monitor.close()

    @property
    def name(self) -> str:
        """The VM, as messages call it."""
        return self._monitor.name

    def disk(self, device: str) -> QmpVm:
        """The disk with the id of the guest's device, or of its drive.

        Raises NoSuchDisk, VmUnreachable.
        """
        return QmpVm(self._monitor, device=device)

    def disk_on(self, node: str) -> QmpVm:
        """The disk whose image has that node name.

        Raises NoSuchDisk, VmUnreachable.
        """
        return QmpVm(self._monitor, node=node)

    def disks(self) -> tuple[GuestDisk, ...]:
        """The disks that the guest has.

        Raises VmUnreachable, VmRefused.
        """
        return tuple(guest_disks(self._monitor.execute("query-block")))

    def state(self) -> VmState:
        """What the VM says of jobs, exports and nodes; no nodes where asking would end it.

        Raises VmUnreachable, VmRefused.
        """
        jobs = self._monitor.execute("query-jobs")
        return VmState(
            jobs,
            self._monitor.execute("query-block-jobs"),
            self._monitor.execute("query-block-exports"),
            nodes_told(self._monitor, jobs),
            GraphEdges(self._monitor.execute("x-debug-query-block-graph")),
        )

    def execute(self, command: str, **arguments: object) -> None:
        """Run a command of which nothing is expected but that it is done.

        Raises VmUnreachable, VmRefused.
        """
        self._monitor.execute(command, arguments)

    def wait_for_event(self, seconds: float) -> None:
        """Return when something may have happened, at the latest after so many seconds."""
        self._monitor.wait_for_event(seconds)
