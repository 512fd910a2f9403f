# SPDX-License-Identifier: Apache-2.0
"""A running VM that is reached by its QMP socket."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from chainmerge.errors import ChainmergeError
from chainmerge.live.errors import NoSuchDisk, VmRefused
from chainmerge.live.nodes import PLAIN_PROTOCOLS, BlockGraph, BlockNode
from chainmerge.live.port import (
    AddBitmap,
    BitmapAction,
    ClearBitmap,
    CommitOrder,
    DisableBitmap,
    DiskLimits,
    EnableBitmap,
    JobPhase,
    JobState,
    MergeBitmap,
    PullOrder,
    RemoveBitmap,
)
from chainmerge.live.qmp.block_graph import (
    GraphEdges,
    active_nodes,
    block_node,
    described_disks,
    described_nodes,
    lengths_of,
    root_above,
    writable_disks,
)
from chainmerge.live.qmp.monitor import Monitor
from chainmerge.live.qmp.named_nodes import query_nodes
from chainmerge.live.qmp.qmp_schema import takes_argument
from chainmerge.records.live_journal import load_live_journal
from chainmerge.storage.writability import why_nobody_can_write

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

_PHASES: Final[Mapping[str, JobPhase]] = MappingProxyType(
    {
        "created": JobPhase.RUNNING,
        "running": JobPhase.RUNNING,
        "paused": JobPhase.PAUSED,
        "ready": JobPhase.READY,
        # Paused while it was ready.
        "standby": JobPhase.PAUSED,
        "waiting": JobPhase.ENDING,
        "pending": JobPhase.HELD,
        "aborting": JobPhase.ENDING,
        "concluded": JobPhase.DONE,
        "null": JobPhase.DONE,
    }
)
_LIMITS: Final = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")
_MORE_LIMITS: Final = (
    *(f"{name}_max" for name in _LIMITS),
    *(f"{name}_max_length" for name in _LIMITS),
    "iops_size",
)
# QEMU lets no job have a limit of less.
_SLOWEST: Final = 1
_HELD: Final = MappingProxyType({"speed": _SLOWEST, "on-error": "stop", "auto-finalize": False})
"""How jobs begin: they wait for us to say when, and how fast, they go on."""
DEFAULT_HOLD_SECONDS: Final = 1.0
_PROBE: Final = "chainmerge-probe"
"""The node by which it is found out whether QEMU can write to a file."""
_COMMIT: Final = "block-commit"
_STREAM: Final = "block-stream"
_MASK_PROTOCOL: Final = "backing-mask-protocol"
_AUTOMATIC: Final = "#"
"""What node names begin with that QEMU made up."""


class QmpVm:
    """One disk of a VM, by the VM's QMP socket; a context manager.

    Its methods are those of :class:`chainmerge.live.port.LiveVm`, and are described there.

    Args:
        socket: path of the socket, or the connection to it that several disks of the VM share.
        device: the id of the guest's device, or of its drive.
        node: the node name of the disk's active image; instead of *device*.
        monitor_hold: seconds that the socket is kept from others at a time while there is nothing
            to do but to wait; a connection that is shared has that already.

    Raises:
        VmUnreachable: there is no VM at the socket, or somebody else is connected.
        NoSuchDisk: the VM has no such disk.
    """

    leaves_tombstones: Final = True
    pulls_into_middle: Final = True

    def __init__(
        self,
        socket: str | Monitor,
        *,
        device: str | None = None,
        node: str | None = None,
        monitor_hold: float = DEFAULT_HOLD_SECONDS,
    ) -> None:
        self._monitor = socket if isinstance(socket, Monitor) else Monitor(socket, monitor_hold)
        self._device = device
        self._node = node
        self._chain: tuple[str, ...] = ()
        try:
            self._own_cwd = self._monitor.working_directory
            self.graph()
        except BaseException:
            self._monitor.close()
            raise

    def __enter__(self) -> Self:
        """Return the disk itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Disconnect; the VM goes on with whatever it does.

        A connection that is shared is made again by whoever asks next.
        """
        self._monitor.close()

    @property
    def name(self) -> str:
        return self._monitor.name

    @property
    def address(self) -> tuple[str, ...]:
        disk = ("--device", self._device) if self._device is not None else ("--node", self._node)
        return ("--qmp", self._monitor.path, *(str(part) for part in disk))

    @property
    def process(self) -> int | None:
        return self._monitor.process

    @property
    def qemu_version(self) -> tuple[int, int, int]:
        found = self._monitor.execute("query-version")["qemu"]
        return found["major"], found["minor"], found["micro"]

    def graph(self) -> BlockGraph:
        infos = self._node_infos()
        edges, lengths = self._edges(), lengths_of(infos)
        nodes = {
            info["node-name"]: block_node(info, edges, self._path(info["file"]), lengths)
            for info in infos
        }
        graph = BlockGraph(nodes, self._root(nodes))
        self._chain = tuple(node.name for node in graph.chain())
        return graph

    def _node_infos(self) -> list[dict[str, Any]]:
        return query_nodes(self._monitor)

    def _edges(self) -> GraphEdges:
        return GraphEdges(self._monitor.execute("x-debug-query-block-graph"))

    def layout(self) -> BlockGraph:
        return self.graph()

    def _path(self, filename: str) -> Path | None:
        if filename.startswith("/"):
            return Path(filename)
        # What has a colon before the first slash is a protocol, or JSON.
        if not filename or ":" in filename.split("/", 1)[0] or self._own_cwd is None:
            return None
        return self._own_cwd / filename

    def _root(self, nodes: Mapping[str, BlockNode]) -> str:
        if self._node is not None:
            # A merge of the active image closes it: the disk is known by those that are left.
            names = (self._node, *self._chain)
            known_node = next((name for name in names if name in nodes), None)
            known_node = known_node or self._node_merged_into(nodes)
            if known_node is None:
                raise NoSuchDisk(self.name, self._node, described_nodes(nodes))
            return root_above(known_node, nodes)
        told = self._monitor.execute("query-block")
        disks = active_nodes(told)
        if str(self._device) not in disks:
            raise NoSuchDisk(self.name, str(self._device), described_disks(told, nodes))
        return disks[str(self._device)]

    def _node_merged_into(self, nodes: Mapping[str, BlockNode]) -> str | None:
        """What is in the place of a node that an interrupted merge was given, and has closed."""
        for name, node in nodes.items():
            path = BlockGraph(nodes, name).path_of(node)
            with contextlib.suppress(ChainmergeError):
                journal = None if path is None else load_live_journal(path)
                if journal is None or not journal.took_effect:
                    continue
                if journal.address[-2:] == ["--node", self._node]:
                    return name
        return None

    def why_not_writable(self, node: BlockNode) -> str | None:
        """Have QEMU open what the image lies in a second time, for writing, and close it again.

        It alone knows what it may do, with its user, its name space, its security label. Nobody
        uses that node, so nothing is read or written, and no lock is asked for.
        """
        children = self._edges().children[node.name]
        files = {children.get(role) for role in ("file", "data-file")}
        for info in self._node_infos():
            if info["node-name"] in files and info["drv"] in PLAIN_PROTOCOLS:
                path = self._path(info["file"])
                reason = None if path is None else self._why_not_opened(info["drv"], path)
                if reason is not None:
                    return reason
        return None

    def _why_not_opened(self, driver: str, path: Path) -> str | None:
        probe = {
            "driver": driver,
            "node-name": _PROBE,
            "filename": str(path),
            "read-only": False,
            "auto-read-only": False,
            "locking": "off",
        }
        if driver == "host_device":
            # Linux lets a device that is read-only be opened for writing, and fails the writes.
            with contextlib.suppress(OSError):
                reason = why_nobody_can_write(path)
                if reason is not None:
                    return reason
        # A process that was killed may have left it.
        with contextlib.suppress(VmRefused):
            self.forget_node(_PROBE)
        try:
            self._monitor.execute("blockdev-add", probe)
        except VmRefused as refused:
            return refused.reason
        self.forget_node(_PROBE)
        return None

    def why_bitmaps_stay(self, node: BlockNode) -> str | None:  # noqa: ARG002  # QEMU changes all
        return None

    def change_bitmaps(self, actions: Sequence[BitmapAction]) -> None:
        if actions:
            steps = [_as_qmp(action) for action in actions]
            self._monitor.execute("transaction", {"actions": steps})

    def make_read_only(self, node: str) -> None:
        """Raise VmRefused for a node whose name QEMU made up, which cannot be reopened."""
        self._reopen(node, "ro")

    def make_writable(self, node: str) -> None:
        """As :meth:`make_read_only`."""
        self._reopen(node, "rw")

    def _reopen(self, name: str, mode: str) -> None:
        if name.startswith(_AUTOMATIC):
            raise VmRefused(self.name, "blockdev-reopen", f"{name} is a name that QEMU made up")
        info = next(info for info in self._node_infos() if info["node-name"] == name)
        children = self._edges().children[name]
        options: dict[str, object] = {
            "driver": info["drv"],
            "node-name": name,
            "read-only": mode == "ro",
            "file": children["file"],
            "cache": {
                "direct": info["cache"]["direct"],
                "no-flush": info["cache"]["no-flush"],
            },
            "detect-zeroes": info["detect_zeroes"],
            # What is told nowhere. A disk that does not want its discards passed on is rare.
            "discard": "unmap",
        }
        if info["drv"] == "qcow2":
            options["backing"] = children.get("backing")
            if "data-file" in children:
                # Left out, it is opened by its name once more, and can be written to no longer.
                options["data-file"] = children["data-file"]
        self._monitor.execute("blockdev-reopen", {"options": [options]})

    def start_commit(self, order: CommitOrder) -> None:
        arguments: dict[str, object] = {
            "job-id": order.job,
            "device": order.root,
            "top-node": order.top,
            "base-node": order.base,
            **_HELD,
            "auto-dismiss": False,
        }
        if order.backing_name is not None:
            arguments["backing-file"] = order.backing_name
            arguments |= self._masking(_COMMIT, order)
        self._monitor.execute(_COMMIT, arguments)

    def _masking(self, command: str, order: CommitOrder | PullOrder) -> dict[str, object]:
        """What keeps QEMU from declaring the name of a protocol as a format, if it can be kept."""
        if not order.lacks_format_node:
            return {}
        schema = self._monitor.execute("query-qmp-schema")
        return {_MASK_PROTOCOL: True} if takes_argument(schema, command, _MASK_PROTOCOL) else {}

    def start_pull(self, order: PullOrder) -> None:
        arguments: dict[str, object] = {
            "job-id": order.job,
            "device": order.top,
            **_HELD,
            # A job that is done keeps its filter, which has nothing below it any more. Whoever
            # asks for all nodes then makes QEMU (7.2) end by a segmentation fault.
            "auto-dismiss": True,
        }
        if order.onto is not None:
            arguments["base-node"] = order.onto
            arguments["backing-file"] = order.backing_name
            arguments |= self._masking(_STREAM, order)
        self._monitor.execute(_STREAM, arguments)

    def job(self, job: str) -> JobState | None:
        found = _with_id(self._monitor.execute("query-jobs"), "id", job)
        if found is None:
            return None
        block = _with_id(self._monitor.execute("query-block-jobs"), "device", job) or {}
        status = str(block.get("io-status", "ok"))
        phase = _PHASES[found["status"]]
        return JobState(
            phase=phase,
            done=found["current-progress"],
            total=found["total-progress"],
            out_of_space=phase is JobPhase.PAUSED and status == "nospace",
            stopped_by_error=phase is JobPhase.PAUSED and status != "ok",
            error=found.get("error"),
        )

    def described_job(self, job: str) -> str:
        found = _with_id(self._monitor.execute("query-jobs"), "id", job)
        if found is None:
            return job
        state = self.job(job)
        stopped = state is not None and state.stopped_by_error
        return f"{job} ({found['type']}{', stopped by an error' if stopped else ''})"

    def pause(self, job: str) -> None:
        self._monitor.execute("job-pause", {"id": job})

    def resume(self, job: str) -> None:
        self._monitor.execute("job-resume", {"id": job})

    def limit(self, job: str, bandwidth: int | None) -> None:
        self._monitor.execute("block-job-set-speed", {"device": job, "speed": bandwidth or 0})

    def complete(self, job: str) -> None:
        self._monitor.execute("job-complete", {"id": job})

    def finalize(self, job: str) -> None:
        self._monitor.execute("job-finalize", {"id": job})

    def cancel(self, job: str) -> None:
        self._monitor.execute("job-cancel", {"id": job})

    def dismiss(self, job: str) -> None:
        self._monitor.execute("job-dismiss", {"id": job})

    def name_backing_file(self, root: str, image: str, name: str) -> None:
        arguments = {"device": root, "image-node-name": image, "backing-file": name}
        self._monitor.execute("change-backing-file", arguments)

    def forget_node(self, node: str) -> None:
        self._monitor.execute("blockdev-del", {"node-name": node})

    def set_write_threshold(self, node: str, offset: int) -> None:
        arguments = {"node-name": node, "write-threshold": offset}
        self._monitor.execute("block-set-write-threshold", arguments)

    def highest_write(self, node: str) -> int:
        stats = self._monitor.execute("query-blockstats", {"query-nodes": True})
        found = _with_id(stats, "node-name", node)
        return int(found["stats"]["wr_highest_offset"]) if found is not None else 0

    def disk_limits(self) -> DiskLimits:
        inserted = self._disk()["inserted"]
        names = (*_LIMITS, *_MORE_LIMITS)
        return DiskLimits(
            {name: int(inserted[name]) for name in names if name in inserted},
            inserted.get("group"),
        )

    def limit_disk(self, limits: DiskLimits) -> None:
        disk = self._disk()
        arguments: dict[str, object] = {**dict.fromkeys(_LIMITS, 0), **limits.limits}
        if disk.get("device"):
            arguments["device"] = disk["device"]
        else:
            arguments["id"] = disk["qdev"]
        if limits.group is not None:
            arguments["group"] = limits.group
        self._monitor.execute("block_set_io_throttle", arguments)

    def _disk(self) -> dict[str, Any]:
        root = self.graph().root
        for disk in self._monitor.execute("query-block"):
            if disk.get("inserted", {}).get("node-name") == root:
                return dict(disk)
        reason = f"no device of the guest reads {root}"
        raise VmRefused(self.name, "block_set_io_throttle", reason)

    def wait_for_event(self, seconds: float) -> None:
        self._monitor.wait_for_event(seconds)

    def rest(self, seconds: float) -> None:
        self._monitor.rest(seconds)

    def let_others_in(self) -> None:
        self._monitor.let_others_in()


def devices_in(socket: str) -> tuple[str, ...]:
    """The ids of a VM's disks that the guest can write to.

    Raises:
        VmUnreachable: there is no VM at the socket, or somebody else is connected.
    """
    monitor = Monitor(socket, DEFAULT_HOLD_SECONDS)
    try:
        return writable_disks(monitor.execute("query-block"))
    finally:
        monitor.close()


def _with_id(found: Sequence[dict[str, Any]], key: str, value: str) -> dict[str, Any] | None:
    return next((one for one in found if one.get(key) == value), None)


def _as_qmp(action: BitmapAction) -> dict[str, object]:
    """An action as ``transaction`` takes it."""
    data: dict[str, object] = {"node": action.node}
    match action:
        case MergeBitmap():
            kind = "merge"
            data["target"] = action.name
            data["bitmaps"] = [{"node": node, "name": action.name} for node in action.sources]
        case AddBitmap():
            kind = "add"
            data |= {"name": action.name, "granularity": action.granularity}
            data |= {"persistent": True, "disabled": True}
        case RemoveBitmap():
            kind, data["name"] = "remove", action.name
        case ClearBitmap():
            kind, data["name"] = "clear", action.name
        case EnableBitmap():
            kind, data["name"] = "enable", action.name
        case DisableBitmap():
            kind, data["name"] = "disable", action.name
    return {"type": f"block-dirty-bitmap-{kind}", "data": data}
