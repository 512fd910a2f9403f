# SPDX-License-Identifier: Apache-2.0
"""A running VM with several disks, each with a guest of its own that writes to it.

As a program it is a manager of several disks that kills itself:
``python -m tests.support.disks_vm SOCKET CALL before|after TOP=BASE...``.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from chainmerge import live
from chainmerge.options import LiveOptions
from tests.support.dying import MOMENTS, DyingVm, Moment, kill_ourselves
from tests.support.live_scenario import DISK, LiveScenario, build
from tests.support.live_vm import Guest, LiveTestVm, disk_of_nodes, running_qemu
from tests.support.nbd import NbdClient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


# Active, internal, active: whether top is what the guest writes to.
KINDS: Final = (True, False, True)
DISKS: Final = len(KINDS)
# Slow enough for the guests to write in between.
OPTIONS: Final = LiveOptions(delete=True, bandwidth=64 << 20)


def build_disks(directory: Path, seed: int, kinds: Sequence[bool] = KINDS) -> list[LiveScenario]:
    """A chain for each disk; of which *kinds* say whether top is what the guest writes to."""
    return [
        build(directory / f"disk{number}", seed + number, levels=1 + number % 2, active=is_active)
        for number, is_active in enumerate(kinds)
    ]


def device(number: int) -> str:
    """The id of a disk."""
    return f"disk{number}"


@dataclass
class DiskOfVm:
    """One of the disks, with what a :class:`Guest` needs to write to it."""

    vm: LiveTestVm
    number: int

    def export(self) -> None:
        """Let an NBD client be the guest, on the node that the disk reads now."""
        self.vm.execute(
            "block-export-add",
            id=f"guest{self.number}",
            type="nbd",
            name=device(self.number),
            writable=True,
            node_name=self._inserted()["node-name"],
        )

    def client(self) -> NbdClient:
        """A connection to the guest's disk."""
        return NbdClient(self.vm.nbd, device(self.number))

    def chain(self) -> list[str]:
        """The names of the files of the disk's chain, the active one first."""
        with live.QmpVm(str(self.vm.qmp), device=device(self.number)) as disk:
            layout = disk.layout()
            return [Path(str(layout.path_of(node))).name for node in layout.chain()]

    def _inserted(self) -> Any:
        path = f"/machine/peripheral/{device(self.number)}/"
        (disk,) = (one for one in self.vm.execute("query-block") if one["qdev"].startswith(path))
        return disk["inserted"]

    @staticmethod
    def write_on(client: NbdClient, offset: int, data: bytes) -> None:
        """Have the guest write."""
        client.write(offset, data)

    @property
    def alive(self) -> bool:
        """Whether QEMU runs."""
        return self.vm.alive


@contextlib.contextmanager
def running_disks(
    directory: Path, scenarios: Sequence[LiveScenario], more: Sequence[str] = ()
) -> Iterator[tuple[LiveTestVm, list[DiskOfVm]]]:
    """A VM with a disk for each chain, and with *more* on its command line."""
    chains = [scenario.images for scenario in scenarios]
    with running_disks_of(directory, chains, more) as found:
        yield found


@contextlib.contextmanager
def running_disks_of(
    directory: Path, chains: Sequence[Sequence[Path]], more: Sequence[str] = ()
) -> Iterator[tuple[LiveTestVm, list[DiskOfVm]]]:
    """The same, of images."""
    words = [
        word
        for number, images in enumerate(chains)
        for word in disk_of_nodes(images, device(number), f"d{number}-")
    ]
    with running_qemu(directory, [*words, *more]) as vm:
        vm.serve_nbd()
        disks = [DiskOfVm(vm, number) for number in range(len(chains))]
        for disk in disks:
            disk.export()
        yield vm, disks


@contextlib.contextmanager
def writing_guests(
    disks: Sequence[DiskOfVm], seed: int, *, flushes: bool = False
) -> Iterator[list[Guest]]:
    """Guests that write to all disks."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                Guest(disk, seed + disk.number, DISK, flushes=flushes)  # type: ignore[arg-type]
            )
            for disk in disks
        ]


def dying_disks(
    machine: live.QmpMachine, count: int, call: int, moment: Moment, die: Callable[[], None]
) -> list[DyingVm]:
    """The disks of a VM; at the call with that number, of all of them, something dies."""
    numbers = itertools.count(1)
    return [
        DyingVm(machine.disk(device(number)), call, moment, die, numbers=numbers)
        for number in range(count)
    ]


def main() -> None:
    socket, call, moment, *pairs = sys.argv[1:]
    tops, bases = zip(*(pair.split("=") for pair in pairs), strict=True)
    with live.QmpMachine(socket) as machine:
        disks = dying_disks(machine, len(tops), int(call), MOMENTS[moment], kill_ourselves)
        live.merge_disks(disks, tops, bases, options=OPTIONS)


if __name__ == "__main__":
    main()
