# SPDX-License-Identifier: Apache-2.0
"""The bitmaps of all disks of a running VM, or of a libvirt domain that need not run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.bitmaps.listing import bitmaps_list_disks, shared_checkpoints
from chainmerge.bitmaps.pruning import prune_whole_disks
from chainmerge.bitmaps.rules import BitmapState, chain_test
from chainmerge.documents.bitmaps import (
    BitmapListing,
    BitmapRow,
    BitmapsOfDisks,
    BitmapVerdict,
    PruneOfDisks,
)
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.live.libvirt.connection import DEFAULT_URI, AnyDomainConnection
from chainmerge.live.libvirt.description import targets_with_bitmaps
from chainmerge.live.libvirt.disk import DomainDisk
from chainmerge.live.qmp.vm import QmpVm, devices_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from chainmerge.live.nodes import BlockGraph, BlockNode
    from chainmerge.options import Access


def list_bitmaps_of_domain(
    domain: str, uri: str = DEFAULT_URI, access: Access | None = None
) -> BitmapsOfDisks:
    """The bitmaps of a domain's disks, and which checkpoints serve a backup of all of them.

    Of a domain that runs they are as libvirt tells of them: what is on disk of an active image is
    not up to date. Disks that cannot have bitmaps are left out.

    Args:
        domain: its name.
        uri: of the libvirt to connect to.
        access: how images may be found and reached, if it does not run.

    Raises:
        LibvirtMissing, VmUnreachable, UnknownDomain: see :class:`AnyDomainConnection`.
        ChainmergeError: a chain cannot be found or read.
    """
    runs, images = _disks_of(domain, uri)
    if not runs:
        return bitmaps_list_disks(tuple(images.values()), access)
    return _of_disks(_graph_of(DomainDisk(domain, target, uri)) for target in images)


def list_bitmaps_of_vm(socket: str) -> BitmapsOfDisks:
    """The bitmaps of a running VM's disks, and which checkpoints serve a backup of all of them.

    They are as the VM has them in memory. Disks that cannot have bitmaps are left out.

    Args:
        socket: path of the VM's QMP socket.

    Raises:
        VmUnreachable: there is no VM at the socket, or somebody else is connected.
    """
    return _of_disks(_graph_of(QmpVm(socket, device=device)) for device in devices_in(socket))


def prune_disks_of_domain(
    domain: str, uri: str = DEFAULT_URI, access: Access | None = None
) -> PruneOfDisks:
    """Remove broken bitmaps from all images of a domain's disks; all are planned before.

    A domain that runs has its images locked, which refuses that.

    Args:
        domain: its name.
        uri: of the libvirt to connect to.
        access: how images may be found and reached.

    Raises:
        LibvirtMissing, VmUnreachable, UnknownDomain: see :class:`AnyDomainConnection`.
        ChainmergeError: what :func:`chainmerge.prune_whole_disks` raises.
    """
    _, images = _disks_of(domain, uri)
    return prune_whole_disks(tuple(images.values()), access)


def _disks_of(domain: str, uri: str) -> tuple[bool, dict[str, Path]]:
    """Whether a domain runs, and its disks that can have bitmaps, by their targets."""
    with AnyDomainConnection(uri, domain) as connection:
        runs = bool(connection.ask("virDomainIsActive", connection.domain.isActive))
        described = connection.ask("virDomainGetXMLDesc", connection.domain.XMLDesc)
    return runs, targets_with_bitmaps(described)


def _graph_of(disk: QmpVm | DomainDisk) -> BlockGraph:
    with disk:
        return disk.graph()


def _of_disks(graphs: Iterable[BlockGraph]) -> BitmapsOfDisks:
    disks = tuple(_listing(graph) for graph in graphs if graph.chain()[0].driver == "qcow2")
    return BitmapsOfDisks(REPORT_VERSION, disks, shared_checkpoints(disks))


def _listing(graph: BlockGraph) -> BitmapListing:
    chain = graph.chain()
    rows = tuple(row for node in chain for row in _rows_of(node, graph))
    return BitmapListing(REPORT_VERSION, _path_of(chain[0], graph), rows, tuple(_verdicts(chain)))


def _rows_of(node: BlockNode, graph: BlockGraph) -> Iterator[BitmapRow]:
    for found in node.bitmap_results():
        yield BitmapRow(
            image=_path_of(node, graph),
            name=found.name,
            state=found.state,
            granularity=found.granularity,
            dirty_bytes=found.dirty_bytes,
            tombstone=found.tombstone,
        )


def _path_of(node: BlockNode, graph: BlockGraph) -> str:
    return str(graph.path_of(node) or node.name)


def _verdicts(chain: tuple[BlockNode, ...]) -> Iterator[BitmapVerdict]:
    """The verdict on every name, from the active image down."""
    for name in sorted({bitmap.name for node in chain for bitmap in node.bitmaps}):
        found = (node.bitmap(name) for node in chain)
        states = [BitmapState.ABSENT if one is None else one.state for one in found]
        verdict = chain_test(states)
        yield BitmapVerdict(name, verdict.passes, verdict.reason)
