# SPDX-License-Identifier: Apache-2.0
"""Options that lead to a disk of a running VM, to several, or to all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Final, Literal, ParamSpec, TypeAlias, TypeVar

import click
from msgspec import Struct

from chainmerge import live as api
from chainmerge.cli.commands import PanelOption
from chainmerge.cli.errors import DiskNotNamed
from chainmerge.cli.options import with_options
from chainmerge.cli.params import DISK_TARGET, DOMAIN
from chainmerge.live.errors import LiveDisksMismatched
from chainmerge.merging.errors import DisksMismatched

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.documents.disks import DisksPlan, DisksReport
    from chainmerge.documents.progress import OnProgress, ShouldStop
    from chainmerge.options import Access, LiveOptions

P = ParamSpec("P")
R = TypeVar("R")
Function = Callable[..., R]
_disk_option: Final = partial(click.option, cls=PanelOption, panel="The disk")


class QmpAddress(Struct, frozen=True):
    """A VM that is reached by its QMP socket; ``named`` says how its disks are."""

    socket: str
    monitor_hold: float
    named: Literal["device", "node"]

    def machine(self) -> api.QmpMachine:
        return api.QmpMachine(self.socket, monitor_hold=self.monitor_hold)

    def disks(self, stack: contextlib.ExitStack, names: Sequence[str]) -> list[api.LiveDisk]:
        machine = stack.enter_context(self.machine())
        opened = machine.disk if self.named == "device" else machine.disk_on
        return [stack.enter_context(opened(name)) for name in names]


class DomainAddress(Struct, frozen=True):
    """A domain of libvirt."""

    domain: str
    uri: str

    def machine(self) -> api.Domain:
        return api.Domain(self.domain, self.uri)

    def disks(self, stack: contextlib.ExitStack, names: Sequence[str]) -> list[api.LiveDisk]:
        return [stack.enter_context(api.DomainDisk(self.domain, name, self.uri)) for name in names]


class OneDisk(Struct, frozen=True):
    """The disk that a command is for."""

    vm: QmpAddress | DomainAddress
    name: str

    @contextlib.contextmanager
    def open(self) -> Iterator[api.LiveDisk]:
        """Connect to it; raises what :class:`api.QmpVm` and :class:`api.DomainDisk` raise."""
        with contextlib.ExitStack() as stack:
            (disk,) = self.vm.disks(stack, [self.name])
            yield disk

    def images_to_merge(self, tops: Sequence[str], bases: Sequence[str]) -> tuple[str, str | None]:
        """The images of a merge on this disk.

        Raises click.UsageError, LiveDisksMismatched, DisksMismatched.
        """
        _require_tops(tops)
        if len(tops) > 1:
            raise LiveDisksMismatched(1, len(tops))
        if len(bases) > 1:
            raise DisksMismatched(len(tops), len(bases))
        return tops[0], bases[0] if bases else None


class NamedDisks(Struct, frozen=True):
    """Several disks of a VM, in the order of what is merged on them."""

    vm: QmpAddress | DomainAddress
    names: tuple[str, ...]

    def plan(
        self, tops: Sequence[str], bases: Sequence[str], access: Access, options: LiveOptions
    ) -> DisksPlan:
        """What a merge on these disks would do; raises what :func:`api.plan_disks` raises."""
        _require_tops(tops)
        with contextlib.ExitStack() as stack:
            disks = self.vm.disks(stack, self.names)
            decided: DisksPlan = api.plan_disks(disks, tops, bases, access, options)
        return decided

    def merge(
        self,
        tops: Sequence[str],
        bases: Sequence[str],
        access: Access,
        options: LiveOptions,
        on_progress: OnProgress,
        should_stop: ShouldStop,
    ) -> DisksReport:
        """Merge on these disks; raises what :func:`api.merge_disks` raises."""
        _require_tops(tops)
        with contextlib.ExitStack() as stack:
            disks = self.vm.disks(stack, self.names)
            done: DisksReport = api.merge_disks(
                disks, tops, bases, access, options, on_progress, should_stop
            )
        return done


class AllDisks(Struct, frozen=True):
    """All disks of a VM that have something to merge."""

    vm: QmpAddress | DomainAddress

    def plan(
        self, tops: Sequence[str], bases: Sequence[str], access: Access, options: LiveOptions
    ) -> DisksPlan:
        """What a merge on all disks would do; raises what :func:`api.plan_all_disks` raises."""
        with self.vm.machine() as machine:
            decided: DisksPlan = api.plan_all_disks(machine, tops, bases, access, options)
        return decided

    def merge(
        self,
        tops: Sequence[str],
        bases: Sequence[str],
        access: Access,
        options: LiveOptions,
        on_progress: OnProgress,
        should_stop: ShouldStop,
    ) -> DisksReport:
        """Merge on all disks; raises what :func:`api.merge_all_disks` raises."""
        with self.vm.machine() as machine:
            done: DisksReport = api.merge_all_disks(
                machine, tops, bases, access, options, on_progress, should_stop
            )
        return done


DisksOfVm: TypeAlias = OneDisk | NamedDisks | AllDisks


def _require_tops(tops: Sequence[str]) -> None:
    if not tops:
        raise click.UsageError("name the image to merge (TOP), or give --all-disks")


_QMP: Final = _disk_option(
    "--qmp", type=click.Path(), metavar="SOCKET", help="The VM's QMP socket, a Unix socket."
)
_MONITOR_HOLD: Final = _disk_option(
    "--monitor-hold",
    type=click.FloatRange(min=0, max=3600),
    metavar="SECONDS",
    default=api.DEFAULT_HOLD_SECONDS,
    show_default=True,
    help="Keep others from the QMP socket for so long at a time while data is copied.",
)
_DOMAIN: Final = _disk_option(
    "--domain",
    metavar="NAME",
    type=DOMAIN,
    help="The VM, as a libvirt domain.",
)
_CONNECT: Final = _disk_option(
    "--connect", metavar="URI", help=f"The libvirt that runs it; {api.DEFAULT_URI} if not given."
)
_ONE_DISK: Final = (
    _QMP,
    _disk_option(
        "--device", metavar="ID", help="The disk, by the id of the guest's device or of its drive."
    ),
    _disk_option("--node", metavar="NODE", help="The disk, by the node name of its image."),
    _MONITOR_HOLD,
    _DOMAIN,
    _disk_option(
        "--disk",
        "target",
        metavar="TARGET",
        type=DISK_TARGET,
        help="Its disk, by the target: vda.",
    ),
    _CONNECT,
)
_SEVERAL_DISKS: Final = (
    _QMP,
    _disk_option(
        "--device",
        "devices",
        multiple=True,
        metavar="ID",
        help="The disk, by the id of the guest's device or of its drive; once for each TOP.",
    ),
    _disk_option(
        "--node",
        "nodes",
        multiple=True,
        metavar="NODE",
        help="The disk, by the node name of its image; once for each TOP.",
    ),
    _MONITOR_HOLD,
    _DOMAIN,
    _disk_option(
        "--disk",
        "targets",
        multiple=True,
        metavar="TARGET",
        type=DISK_TARGET,
        help="Its disk, by the target: vda; once for each TOP.",
    ),
    _CONNECT,
    _disk_option(
        "--all-disks",
        is_flag=True,
        help="All disks of the VM that TOPs are images of; without TOP, what the guest writes to "
        "on each disk is merged into its backing file.",
    ),
)


def disk_options(function: Function[R]) -> Function[R]:
    """Add the options that lead to a disk of a VM; the command gets ``disk``, a OneDisk."""

    @wraps(function)
    def command(
        *args: Any, device: str | None, node: str | None, target: str | None, **kwargs: Any
    ) -> R:
        named = {"devices": device, "nodes": node, "targets": target}
        given: dict[str, Any] = {name: () if one is None else (one,) for name, one in named.items()}
        rest = {name: kwargs.pop(name) for name in _Place.__struct_fields__ if name not in named}
        place = _Place(**given, **rest)
        return function(*args, disk=place.one_disk(), **kwargs)

    return with_options(command, _ONE_DISK)


def vm_options(function: Function[R]) -> Function[R]:
    """Add the option that leads to a VM; the command gets ``vm``, a QmpAddress."""

    @wraps(function)
    def command(*args: Any, qmp: str, **kwargs: Any) -> R:
        address = QmpAddress(qmp, api.DEFAULT_HOLD_SECONDS, "device")
        return function(*args, vm=address, **kwargs)

    socket = _disk_option(
        "--qmp",
        type=click.Path(),
        metavar="SOCKET",
        required=True,
        help="The VM's QMP socket, a Unix socket.",
    )
    return with_options(command, (socket,))


def disks_options(function: Function[R]) -> Function[R]:
    """Add the options that lead to disks of a VM; the command gets ``disks``, a DisksOfVm."""

    @wraps(function)
    def command(*args: Any, all_disks: bool, **kwargs: Any) -> R:
        place = _Place(**{name: kwargs.pop(name) for name in _Place.__struct_fields__})
        disks = place.all_disks() if all_disks else place.named_disks()
        return function(*args, disks=disks, **kwargs)

    return with_options(command, _SEVERAL_DISKS)


class _Place(Struct, frozen=True, kw_only=True):
    """What was given to lead to disks of a VM."""

    qmp: str | None
    devices: tuple[str, ...]
    nodes: tuple[str, ...]
    monitor_hold: float
    domain: str | None
    targets: tuple[str, ...]
    connect: str | None

    def one_disk(self) -> OneDisk:
        """The disk that is named.

        Raises DiskNotNamed unless that is one, named in one way.
        """
        disks = self.named_disks()
        if not isinstance(disks, OneDisk):
            raise DiskNotNamed
        return disks

    def named_disks(self) -> OneDisk | NamedDisks:
        """The disks that are named.

        Raises DiskNotNamed unless they are, in one way.
        """
        vm, given = self._vm(), (self.devices, self.nodes, self.targets)
        ways = [names for names in given if names]
        if len(ways) != 1 or isinstance(vm, DomainAddress) != bool(self.targets):
            raise DiskNotNamed
        (names,) = ways
        return OneDisk(vm, names[0]) if len(names) == 1 else NamedDisks(vm, names)

    def all_disks(self) -> AllDisks:
        """All disks of the VM.

        Raises DiskNotNamed if one of them is named all the same, or no VM is.
        """
        if self.devices or self.nodes or self.targets:
            raise DiskNotNamed
        return AllDisks(self._vm())

    def _vm(self) -> QmpAddress | DomainAddress:
        """Raise DiskNotNamed unless the VM is named, in one way."""
        by_libvirt = self.domain is not None or self.connect is not None
        if self.qmp is not None and not by_libvirt:
            return QmpAddress(self.qmp, self.monitor_hold, "node" if self.nodes else "device")
        if self.qmp is None and self.domain is not None:
            return DomainAddress(self.domain, self.connect or api.DEFAULT_URI)
        raise DiskNotNamed
