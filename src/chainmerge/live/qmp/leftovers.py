# SPDX-License-Identifier: Apache-2.0
"""What backups and other jobs have left in a VM, and what of it nobody uses. Pure.

What QEMU tells (7.2 to 10.0): jobs that have ended and were not dismissed; whether one waits since
an error; exports, but not whether anybody is connected, which only removing one in mode ``safe``
finds out; the bitmaps of all nodes, those without a name as well. These belong to a job or a
filter, go with it, and nothing else removes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from chainmerge.documents.repair import VmLeftover
from chainmerge.live.nodes import UserKind
from chainmerge.live.qmp.block_graph import GraphEdges
from chainmerge.live.qmp.named_nodes import ENDED, is_ended_stream

if TYPE_CHECKING:
    from collections.abc import Iterator

OUR_JOBS: Final = "chainmerge-"
"""What the ids of our jobs begin with."""
_PLAIN: Final = frozenset({"file", "host_device"})


class VmState(Struct, frozen=True):
    """What a VM says of jobs, exports and nodes: each as QMP has it.

    Attributes:
        jobs: ``query-jobs``.
        block_jobs: ``query-block-jobs``.
        exports: ``query-block-exports``.
        nodes: ``query-named-block-nodes``; empty where a job stands against asking.
        edges: ``x-debug-query-block-graph``.
    """

    jobs: Sequence[dict[str, Any]]
    block_jobs: Sequence[dict[str, Any]]
    exports: Sequence[dict[str, Any]]
    nodes: Sequence[dict[str, Any]]
    edges: GraphEdges

    @property
    def tells_nodes(self) -> bool:
        """Whether nodes, and the bitmaps on them, could be asked for."""
        return not any(map(is_ended_stream, self.jobs))

    def checkpoints_above(self, node: str) -> frozenset[str]:
        """The names of the checkpoints of all nodes that stand on a node."""
        above: set[str] = set()
        found = [node]
        while found:
            users = self.edges.users.get(found.pop(), ())
            more = {one.name for one in users if one.kind is UserKind.NODE} - above
            above |= more
            found += more
        return frozenset(
            bitmap["name"]
            for one in self.nodes
            if one["node-name"] in above
            for bitmap in one.get("dirty-bitmaps", ())
            if _is_checkpoint(bitmap)
        )


class NamedForRemoval(Struct, frozen=True):
    """What goes although somebody could use it still, since the user says so.

    Attributes:
        jobs: Jobs that are cancelled, by their ids.
        bitmaps: The names of bitmaps that are in memory alone.
    """

    jobs: frozenset[str] = frozenset()
    bitmaps: frozenset[str] = frozenset()


def _is_checkpoint(bitmap: dict[str, Any]) -> bool:
    return bool(bitmap["persistent"]) and not bitmap.get("inconsistent", False)


def find_leftovers(state: VmState, wanted: NamedForRemoval) -> Iterator[VmLeftover]:
    """What is there besides checkpoints, and what is to be done about it: jobs first."""
    errors = {job["device"]: job.get("io-status", "ok") for job in state.block_jobs}
    for job in state.jobs:
        yield _of_job(job, errors.get(job["id"], "ok"), wanted)
    files = {node["node-name"]: _file_of(node) for node in state.nodes}
    for export in state.exports:
        yield _of_export(export, files.get(export["node-name"]))
    for node in state.nodes:
        above = state.checkpoints_above(node["node-name"])
        for bitmap in node.get("dirty-bitmaps", ()):
            found = _of_bitmap(bitmap, node, above, wanted)
            if found is not None:
                yield found


def _file_of(node: dict[str, Any]) -> str | None:
    file = str(node.get("file") or "")
    return file if file.startswith("/") else None


def _of_job(job: dict[str, Any], io_status: str, wanted: NamedForRemoval) -> VmLeftover:
    name, status, error = job["id"], job["status"], job.get("error")
    state = f"{job['type']}, {status}" + ("" if error is None else f": {error}")
    if io_status != "ok":
        state += f", stopped by an error ({io_status})"

    def told(action: str | None, reason: str, advice: str = "") -> VmLeftover:
        return VmLeftover("job", name, None, None, state, action, reason, advice)

    if name.startswith(OUR_JOBS):
        advice = "`chainmerge live resume` continues it"
        return told(None, "it is a merge of chainmerge's", advice)
    if is_ended_stream(job):
        reason = "it has ended; until it is dismissed nobody can look at bitmaps: QEMU would end"
        return told("dismiss", reason)
    if status in ENDED:
        return told("dismiss", "it has ended, and nobody has dismissed it")
    if name in wanted.jobs:
        return told("cancel", "it was named")
    end_it = f"end it with the tool that began it, or by --cancel-job {name}"
    if io_status != "ok":
        reason = "it waits since the error; whoever began it can let it go on"
        return told(None, reason, end_it)
    return told(None, "it goes on, or waits for whoever began it", end_it)


def _of_export(export: dict[str, Any], file: str | None) -> VmLeftover:
    def told(action: str | None, reason: str, advice: str = "") -> VmLeftover:
        state = f"{export['type']}{', shutting down' if export['shutting-down'] else ''}"
        node = export["node-name"]
        return VmLeftover("export", export["id"], node, file, state, action, reason, advice)

    if export["type"] != "nbd":
        advice = "end it with the tool that began it"
        return told(None, "whether anybody uses it is not known", advice)
    if export["shutting-down"]:
        return told(None, "it goes by itself once the last client has disconnected")
    return told("remove", "it goes unless a client is connected")


def _of_bitmap(
    bitmap: dict[str, Any], node: dict[str, Any], above: frozenset[str], wanted: NamedForRemoval
) -> VmLeftover | None:
    """None of a checkpoint, and of what is as it should be.

    *above* are the names of checkpoints of the images that stand on the node's.
    """
    name = bitmap.get("name", "")

    def told(state: str, action: str | None, reason: str, advice: str = "") -> VmLeftover:
        where, file = node["node-name"], _file_of(node)
        return VmLeftover("bitmap", name, where, file, state, action, reason, advice)

    if not name:
        return told(
            "without a name",
            None,
            "it belongs to a job or to a filter such as copy-before-write, and goes with that",
            "end the job, or have the filter removed by whoever added it; otherwise it goes when "
            "the VM is stopped",
        )
    if bitmap["busy"]:
        return told(
            "busy",
            None,
            "a job or an export uses it",
            "end that first, then run the same command again",
        )
    if _is_checkpoint(bitmap):
        return None
    if bitmap["persistent"] and node["ro"]:
        return told(
            "inconsistent",
            None,
            "QEMU cannot change an image that it has open for reading only",
            "a merge into that image removes it, or `chainmerge bitmaps repair` once the VM is "
            "stopped",
        )
    if bitmap["persistent"] and name in above:
        return told(
            "inconsistent",
            None,
            "an image above has that checkpoint, and would pass for all of it if this was gone",
            "`chainmerge bitmaps repair` drops both once the VM is stopped, a merge into that "
            "image keeps what tells",
        )
    if bitmap["persistent"]:
        return told("inconsistent", "remove", "it is worthless: it was in use when QEMU ended")
    if not bitmap["recording"]:
        reason = "it is in memory alone and records nothing, as what a backup makes for itself"
        return told("in memory", "remove", reason)
    if name in wanted.bitmaps:
        return told("in memory, recording", "remove", "it was named")
    return told(
        "in memory, recording",
        None,
        "the next backup may build on it, as those of Proxmox VE do",
        "name it if no backup does",
    )
