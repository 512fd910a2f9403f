# SPDX-License-Identifier: Apache-2.0
"""A domain of a real libvirt with several disks, each with a guest of its own that writes to it.

As a program it is a manager of several disks that kills itself, as that of
:mod:`tests.support.disks_vm`.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from chainmerge import live
from tests.support.disks_vm import OPTIONS
from tests.support.domain_vm import (
    DiskOfGuest,
    DomainGuest,
    TestDomain,
    alias_of,
    disk_described,
    let_die,
    running_domain_with,
)
from tests.support.dying import kill_ourselves
from tests.support.live_scenario import DISK
from tests.support.nbd import NbdClient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.support.dying import Moment
    from tests.support.live_scenario import LiveScenario


def target_of(number: int) -> str:
    """The target of a disk."""
    return f"vd{'abcdefgh'[number]}"


@dataclass
class DiskOfDomain:
    """One of the disks, with what a :class:`DomainGuest` needs to write to it."""

    domain: TestDomain
    number: int

    @property
    def directory(self) -> Path:
        return self.domain.directory

    @property
    def alive(self) -> bool:
        return self.domain.alive

    def is_suspended(self) -> bool:
        return self.domain.is_suspended()

    def export(self) -> None:
        """Let an NBD client be the guest, on the node that the disk reads now."""
        path = f"/machine/peripheral/{alias_of(target_of(self.number))}/"
        told = self.domain.execute("query-block")
        (disk,) = (one for one in told if one["qdev"].startswith(path))
        self.domain.execute(
            "block-export-add",
            id=f"guest{self.number}",
            type="nbd",
            name=target_of(self.number),
            writable=True,
            node_name=disk["inserted"]["node-name"],
        )

    def client(self) -> NbdClient:
        """A connection to the guest's disk."""
        return NbdClient(self.domain.nbd, target_of(self.number))

    def write_on(self, client: NbdClient, offset: int, data: bytes) -> None:
        """Have the guest write, once it runs."""
        self.domain.write_on(client, offset, data)


@contextlib.contextmanager
def running_domain_of(
    directory: Path, uri: str, scenarios: Sequence[LiveScenario], more: Sequence[str] = ()
) -> Iterator[tuple[TestDomain, list[DiskOfDomain]]]:
    """A domain with a disk for each chain, and with *more* disks as they are described."""
    described = [
        disk_described(target_of(number), scenario.images[-1])
        for number, scenario in enumerate(scenarios)
    ]
    with running_domain_with(directory, uri, [*described, *more]) as domain:
        domain.serve_nbd()
        disks = [DiskOfDomain(domain, number) for number in range(len(scenarios))]
        for disk in disks:
            disk.export()
        yield domain, disks


@contextlib.contextmanager
def writing_domain_guests(
    disks: Sequence[DiskOfDomain], seed: int, *, flushes: bool = False
) -> Iterator[list[DomainGuest]]:
    """Guests that write to all disks."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                DomainGuest(cast("Any", disk), seed + disk.number, DISK, flushes=flushes)
            )
            for disk in disks
        ]


@contextlib.contextmanager
def opened_disks(directory: Path, uri: str, domain: str, count: int) -> Iterator[list[DiskOfGuest]]:
    """The disks of a domain, for a merge."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(DiskOfGuest(directory, domain, uri, target_of(number)))
            for number in range(count)
        ]


def let_one_die(
    disks: Sequence[DiskOfGuest], call: int, moment: Moment, die: Callable[[], None]
) -> None:
    """Have *die* called before or after the call with that number, of all disks."""
    numbers = itertools.count(1)
    for disk in disks:
        let_die(disk, call, moment, die, numbers)


def main() -> None:
    directory, uri, domain, call, moment, *pairs = sys.argv[1:]
    tops, bases = zip(*(pair.split("=") for pair in pairs), strict=True)
    with opened_disks(Path(directory), uri, domain, len(tops)) as disks:
        let_one_die(disks, int(call), cast("Moment", moment), kill_ourselves)
        live.merge_disks(disks, tops, bases, options=OPTIONS)


if __name__ == "__main__":
    main()
