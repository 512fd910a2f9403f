# SPDX-License-Identifier: Apache-2.0
"""A VM's block graph from what its monitor answers. Pure.

Who uses which node is told by ``x-debug-query-block-graph`` (QEMU 4.0 and newer; unchanged up to
10.0). Its permissions are of no interest here, its edges are.
"""

from __future__ import annotations

import json
from collections import defaultdict
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from chainmerge.live.nodes import BlockGraph, BlockNode, NodeBitmap, NodeUser, UserKind
from chainmerge.live.port import GuestDisk

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

_USER_KINDS: Final[Mapping[str, UserKind]] = MappingProxyType(
    {
        "block-driver": UserKind.NODE,
        "block-job": UserKind.JOB,
        "block-backend": UserKind.DEVICE,
    }
)

_JSON: Final = "json:"


class GraphEdges:
    """Who uses what, by node names.

    Attributes:
        children: The children of a node, by their roles.
        users: Who uses a node.
    """

    def __init__(self, graph: dict[str, Any]) -> None:
        """Read the answer to ``x-debug-query-block-graph``."""
        self.children: dict[str, dict[str, str]] = defaultdict(dict)
        self.users: dict[str, list[NodeUser]] = defaultdict(list)
        by_id = {node["id"]: node for node in graph["nodes"]}
        for edge in graph["edges"]:
            parent, child = by_id[edge["parent"]], by_id[edge["child"]]
            kind = _USER_KINDS[parent["type"]]
            self.users[child["name"]].append(NodeUser(parent["name"], kind, edge["name"]))
            if kind is UserKind.NODE:
                self.children[parent["name"]][edge["name"]] = child["name"]


def lengths_of(infos: Iterable[dict[str, Any]]) -> dict[str, int]:
    """How many bytes each node has, as ``query-named-block-nodes`` says, by their names."""
    return {info["node-name"]: info["image"]["virtual-size"] for info in infos}


def block_node(
    info: dict[str, Any], edges: GraphEdges, filename: Path | None, lengths: Mapping[str, int]
) -> BlockNode:
    """A node, from what ``query-named-block-nodes`` says of it; *lengths* are those of all."""
    name = info["node-name"]
    children = edges.children[name]
    return BlockNode(
        name=name,
        driver=info["drv"],
        filename=filename,
        read_only=info["ro"],
        virtual_size=info["image"]["virtual-size"],
        backing=children.get("backing"),
        file=children.get("file"),
        users=tuple(edges.users[name]),
        bitmaps=tuple(_bitmaps_of(info)),
        nameless_bitmaps=sum(not one.get("name") for one in info.get("dirty-bitmaps", ())),
        reads_a_part=_reads_a_part(info, lengths.get(children.get("file", ""))),
    )


def _reads_a_part(info: dict[str, Any], length: int | None) -> bool:
    """Whether a raw node was given a part of its file, which has *length* bytes, and not all of it.

    What does not follow from the file's name QEMU tells as JSON in its place.
    """
    if info["drv"] != "raw" or not info["file"].startswith(_JSON):
        return False
    try:
        given = json.loads(info["file"].removeprefix(_JSON))
    except (ValueError, RecursionError):
        # QEMU cuts it off at 4096 bytes.
        return True
    return bool(given.get("offset", 0) != 0 or given.get("size", length) != length)


def _bitmaps_of(info: dict[str, Any]) -> Iterator[NodeBitmap]:
    for bitmap in info.get("dirty-bitmaps", ()):
        # Those without a name belong to jobs.
        if bitmap.get("name"):
            yield NodeBitmap(
                name=bitmap["name"],
                granularity=bitmap["granularity"],
                dirty_bytes=bitmap["count"],
                recording=bitmap["recording"],
                persistent=bitmap["persistent"],
                inconsistent=bitmap.get("inconsistent", False),
                busy=bitmap["busy"],
            )


def active_nodes(disks: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The nodes that disks read, by all that a disk is known by, as ``query-block`` says."""
    return {
        name: disk["inserted"]["node-name"]
        for disk in disks
        if "inserted" in disk
        for name in _names_of(disk)
    }


def writable_disks(disks: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """What the disks are known by that the guest can write to, as ``query-block`` says."""
    writable = (disk for disk in disks if not disk.get("inserted", {"ro": True})["ro"])
    return tuple(list(_names_of(disk))[-1] for disk in writable if any(_names_of(disk)))


def described_disks(disks: Sequence[dict[str, Any]], nodes: Mapping[str, BlockNode]) -> str:
    """The disks with their images, for a sentence, as ``query-block`` says."""
    known = [
        # The id of the device, where there is one, is the last of its names.
        (list(_names_of(disk))[-1], _file_of(nodes.get(disk["inserted"]["node-name"]), nodes))
        for disk in disks
        if "inserted" in disk and any(_names_of(disk))
    ]
    return ", ".join(f"{name} ({image})" for name, image in sorted(known)) or "none"


def guest_disks(disks: Sequence[dict[str, Any]]) -> Iterator[GuestDisk]:
    """The guest's disks, as ``query-block`` says, each by the name that people gave it."""
    for disk in disks:
        names = list(_names_of(disk))
        if not names:
            continue
        # What QEMU has made up is a path.
        given = [name for name in names if not name.startswith("/")]
        yield GuestDisk((given or names)[-1], _unsuited(disk.get("inserted")))


def _unsuited(inserted: dict[str, Any] | None) -> str | None:
    if inserted is None:
        return "it has no medium"
    return "it is read-only" if inserted["ro"] else None


def described_nodes(nodes: Mapping[str, BlockNode]) -> str:
    """The nodes of images, for a sentence, with the files that they have open."""
    known = sorted(name for name, node in nodes.items() if node.file is not None)
    return ", ".join(f"{name} ({_file_of(nodes[name], nodes)})" for name in known) or "none"


def _file_of(node: BlockNode | None, nodes: Mapping[str, BlockNode]) -> str:
    """The file that an image lies in: of the image itself QEMU may tell JSON."""
    below = nodes.get(node.file) if node is not None and node.file is not None else node
    return "not a file" if below is None or below.filename is None else str(below.filename)


def _names_of(disk: dict[str, Any]) -> Iterator[str]:
    """By what a disk is known: its drive, its device's path, and its device's id."""
    if disk.get("device"):
        yield disk["device"]
    path = disk.get("qdev", "")
    if path:
        yield path
    # QEMU tells "/machine/peripheral/ID/virtio-backend" of what was given the id ID.
    parts = path.split("/")
    if parts[1:3] == ["machine", "peripheral"] and len(parts) > 3:
        yield parts[3]


def root_above(wanted: str, nodes: Mapping[str, BlockNode]) -> str:
    """The upper end of the chain that a node is in: a merge may have put others above.

    Or below: after an active merge the node stands on the one that the guest uses now.
    """
    upper = _uppermost_above(wanted, nodes)
    graph = BlockGraph(nodes, upper)
    for image in graph.chain():
        # A job stands on what it merges, and has a backend of its own on base.
        if any(user.kind is not UserKind.NODE for user in graph.users_of(image)):
            return graph.uppermost_over(image).name
    return upper


def _uppermost_above(name: str, nodes: Mapping[str, BlockNode]) -> str:
    seen = set()
    while name not in seen:
        seen.add(name)
        above = (user.name for user in nodes[name].users if user.kind is UserKind.NODE)
        name = next(above, name)
    return name
