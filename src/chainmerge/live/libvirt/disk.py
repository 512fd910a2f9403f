# SPDX-License-Identifier: Apache-2.0
"""A disk of a domain of libvirt, through libvirt's public API alone.

The QEMU of such a domain is libvirt's: nobody else may talk to its monitor. What libvirt does not
tell is found out by what it does: whether a checkpoint is sound by having libvirt validate it,
as before a backup; a bitmap that no checkpoint needs goes by defining its checkpoint anew and
having that deleted, which removes the bitmap from every image of the chain.
"""

from __future__ import annotations

from enum import StrEnum
from threading import Event
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct
from msgspec.structs import replace

from chainmerge.chain.reading import data_file_places
from chainmerge.live.errors import NoSuchDisk, VmRefused
from chainmerge.live.libvirt.connection import DEFAULT_URI, DomainConnection
from chainmerge.live.libvirt.description import (
    checkpoint_description,
    described_targets,
    disks_of,
    for_disk_alone,
    for_disks_alone,
    for_others_alone,
    has_bitmap_on,
    index_of,
    layer_above_protocol,
)
from chainmerge.live.libvirt.stored import stored_bitmaps, stored_entries
from chainmerge.live.nodes import BlockGraph, BlockNode, NodeBitmap, NodeUser, UserKind
from chainmerge.live.port import DiskLimits, JobPhase, JobState
from chainmerge.live.qemu_processes import qemu_of_domain
from chainmerge.storage.writability import why_nobody_can_write

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Self

    from chainmerge.live.libvirt.description import DiskLayer

# libvirt's names of limits, by QEMU's.
_LIMITS: Final[Mapping[str, str]] = MappingProxyType(
    {
        f"{short}{part}{more}": f"{long}_{unit}{more}"
        for short, unit in (("bps", "bytes_sec"), ("iops", "iops_sec"))
        for part, long in (("", "total"), ("_rd", "read"), ("_wr", "write"))
        for more in ("", "_max", "_max_length")
    }
)
_DEFAULT_GRANULARITY: Final = 1 << 16
# The guest is suspended meanwhile.
_LOOKS_FOR_READINESS: Final = 100
_SECONDS_BETWEEN_LOOKS: Final = 0.1


class DomainJobKind(StrEnum):
    """What a block job does."""

    COMMIT = "commit"
    ACTIVE_COMMIT = "active commit"
    PULL = "pull"
    COPY = "copy"
    BACKUP = "backup"
    OTHER = "other"


class DomainJob(Struct, frozen=True):
    """The block job of a disk at one moment; bytes of which ``done`` of ``total`` are copied."""

    kind: DomainJobKind
    done: int
    total: int

    @property
    def is_commit(self) -> bool:
        """Whether it merges."""
        return self.kind in (DomainJobKind.COMMIT, DomainJobKind.ACTIVE_COMMIT)

    @property
    def caught_up(self) -> bool:
        """Whether nothing is left to copy. libvirt reports 0 of 0 of a job that just begins."""
        return 0 < self.total == self.done


class DomainDisk:
    """One disk of a running domain; a context manager.

    Args:
        domain: the domain's name.
        disk: the disk's target, as ``vda``.
        uri: of the libvirt to connect to.

    Raises:
        LibvirtMissing, VmUnreachable, NoSuchDomain: see :class:`DomainConnection`.
        NoSuchDisk: the domain has no such disk.
    """

    leaves_tombstones: Final = False
    """libvirt removes a bitmap from all images of the chain, and disables none."""
    pulls_into_middle: Final = False
    """libvirt's block pull has no argument for it."""

    def __init__(self, domain: str, disk: str, uri: str = DEFAULT_URI) -> None:
        self._connection = DomainConnection(uri, domain)
        self._domain_name = domain
        self._disk = disk
        self._uri = uri
        try:
            self._layers()
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Self:
        """Return the disk itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Disconnect; the domain goes on with whatever it does."""
        self._connection.close()

    @property
    def name(self) -> str:
        """The domain, as messages call it."""
        return self._connection.name

    @property
    def address(self) -> tuple[str, ...]:
        """The options of ``chainmerge live`` that lead to this disk."""
        place = ("--domain", self._domain_name, "--disk", self._disk)
        return place if self._uri == DEFAULT_URI else (*place, "--connect", self._uri)

    @property
    def process(self) -> int | None:
        """The id of the domain's QEMU on this machine; None where that cannot be told."""
        return qemu_of_domain(self._ask("virDomainGetUUIDString", self._domain.UUIDString))

    @property
    def qemu_version(self) -> tuple[int, int, int]:
        """That of the QEMU with which libvirt starts domains now; it knows of no other."""
        found = int(self._ask("virConnectGetVersion", self._domain.connect().getVersion))
        return found // 1_000_000, found // 1000 % 1000, found % 1000

    # The chain

    def layout(self) -> BlockGraph:
        """The chain as it is now, without bitmaps."""
        layers = self._layers()
        job = self.block_job()
        users = () if job is None else (NodeUser(str(job.kind), UserKind.JOB, "backing"),)
        guest = NodeUser(self._disk, UserKind.DEVICE, "root")
        nodes: dict[str, BlockNode] = {}
        for position, layer in enumerate(layers):
            below = layers[position + 1].target if position + 1 < len(layers) else None
            protocol = BlockNode(
                name=layer.protocol_node,
                driver=layer.protocol,
                filename=layer.path,
                read_only=position > 0,
                virtual_size=0,
                backing=None,
                file=None,
                users=(),
                bitmaps=(),
            )
            nodes[layer.target] = replace(
                protocol,
                name=layer.target,
                driver=layer.format,
                virtual_size=layer.virtual_size(),
                backing=below,
                file=protocol.name,
                reads_a_part=layer.reads_a_part,
                users=users if position else (*users, guest),
            )
            nodes[protocol.name] = protocol
        return BlockGraph(nodes, layers[0].target)

    def graph(self) -> BlockGraph:
        """The chain as it is now, with what is known of its bitmaps.

        Those of images that are open for reading only are what is on disk. Of the active image's
        those are sound that pass libvirt's test of the whole chain; of others nobody can make
        use, so that it does not matter what they are.
        """
        graph = self.layout()
        nodes = dict(graph.nodes)
        active, *below = graph.chain()
        if active.driver == "qcow2":
            bitmaps = tuple(self._active_bitmaps((active, *below)))
            nodes[active.name] = replace(active, bitmaps=bitmaps)
        for node in below:
            if node.driver == "qcow2":
                nodes[node.name] = self._with_stored(node)
        return BlockGraph(nodes, graph.root)

    def _with_stored(self, node: BlockNode) -> BlockNode:
        """An image below the active one, with its bitmaps.

        QEMU leaves the base of an active merge writable that is cancelled, and its bitmaps in-use
        on disk. They are sound in memory if they pass the test of the whole chain.
        """
        bitmaps = list(stored_bitmaps(node))
        in_memory = {one.name for one in bitmaps if one.inconsistent and self.passes(one.name)}
        found = tuple(
            replace(one, inconsistent=False, recording=True, dirty_bytes=None)
            if one.name in in_memory
            else one
            for one in bitmaps
        )
        return replace(node, bitmaps=found, read_only=not in_memory)

    def _layers(self) -> list[DiskLayer]:
        disks = disks_of(self._ask("virDomainGetXMLDesc", self._domain.XMLDesc))
        if self._disk not in disks:
            raise NoSuchDisk(self.name, self._disk, described_targets(disks))
        return disks[self._disk]

    # Bitmaps and checkpoints

    def stored_names(self, node: BlockNode) -> Iterator[str]:
        """The names of the bitmaps that an image has on disk."""
        for entry in stored_entries(node):
            yield entry.name

    def known_names(self) -> set[str]:
        """The names of bitmaps that some image of the chain has, or may not have on disk yet."""
        names = self._checkpoint_names()
        for node in self.layout().chain():
            names.update(self.stored_names(node))
        return names

    def _active_bitmaps(self, chain: Sequence[BlockNode]) -> Iterator[NodeBitmap]:
        """Those of the first image of the chain.

        On disk they are all in-use, and those are not there yet that it was given while the
        domain ran: by a backup, or by the snapshot that made it, which carries on what passes.
        """
        on_disk = set(self.stored_names(chain[0]))
        granularities: dict[str, int] = {}
        for node in reversed(chain):
            granularities |= {entry.name: entry.granularity for entry in stored_entries(node)}
        checkpoints = self._checkpoint_names()
        for name in sorted(granularities.keys() | checkpoints):
            sound = self.passes(name)
            if not sound and name not in on_disk | checkpoints:
                continue
            yield NodeBitmap(
                name=name,
                granularity=granularities.get(name, _DEFAULT_GRANULARITY),
                dirty_bytes=None,
                recording=sound,
                persistent=True,
                inconsistent=not sound,
                busy=False,
            )

    def _checkpoint_names(self) -> set[str]:
        """The names of the checkpoints that libvirt has for this disk."""
        found = self._ask("virDomainListAllCheckpoints", self._domain.listAllCheckpoints)
        return {each.getName() for each in found if self._concerns(each)}

    def _concerns(self, checkpoint: Any) -> bool:
        described = self._ask("virDomainCheckpointGetXMLDesc", checkpoint.getXMLDesc)
        return has_bitmap_on(self._disk, described)

    def passes(self, name: str) -> bool:
        """Whether libvirt would take a backup of this disk since this checkpoint: by its own test.

        A checkpoint can be one of other disks as well, and broken there alone.
        """
        known = self._described_checkpoint(name)
        if known is None:
            made = self._validated(checkpoint_description(name, self._disk))
            if made is not None:
                self._forget_checkpoint(made)
            return made is not None
        if has_bitmap_on(self._disk, known):
            if self._validated(known) is not None:
                return True
            if for_others_alone(known, self._disk) is None:
                return False
        if self._validated(for_disk_alone(known, self._disk)) is None:
            return False
        self.define_checkpoint(known)
        return True

    def _validated(self, described: str) -> Any:
        """Define a checkpoint if it passes libvirt's test; None, with nothing changed, if not."""
        library = self._connection.library
        try:
            return self._defined(described, library.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE)
        except VmRefused as refused:
            if _code_of(refused) == library.VIR_ERR_CHECKPOINT_INCONSISTENT:
                return None
            raise

    def define_checkpoint(self, described: str) -> None:
        """Have libvirt know a checkpoint as it is described; no bitmap is looked at."""
        self._defined(described)

    def define_checkpoint_again(self, described: str) -> None:
        """As above, of those disks that the domain has by now."""
        disks = disks_of(self._ask("virDomainGetXMLDesc", self._domain.XMLDesc))
        left = for_disks_alone(described, disks.keys())
        if left is not None:
            self.define_checkpoint(left)

    def _defined(self, described: str, flags: int = 0) -> Any:
        flags |= self._connection.library.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE
        return self._ask(
            "virDomainCheckpointCreateXML",
            lambda: self._domain.checkpointCreateXML(described, flags),
        )

    def _forget_checkpoint(self, checkpoint: Any) -> None:
        """Have libvirt forget a checkpoint, whose bitmaps stay."""
        flag = self._connection.library.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY
        self._ask("virDomainCheckpointDelete", lambda: checkpoint.delete(flag))

    def checkpoint_of_others(self, name: str) -> str | None:
        """A checkpoint as it is to be described once this disk has none of that name.

        None where it is one of no other disk.
        """
        known = self._described_checkpoint(name)
        return None if known is None else for_others_alone(known, self._disk)

    def remove_everywhere(self, name: str) -> None:
        """Remove a bitmap, and the checkpoint if there is one, from all images of the chain.

        What the checkpoint is of other disks has to be defined again.
        """
        known = self._described_checkpoint(name)
        alone = (
            checkpoint_description(name, self._disk)
            if known is None
            else for_disk_alone(known, self._disk)
        )
        # libvirt removes the bitmaps of all disks that the checkpoint is of.
        made = self._defined(alone)
        self._ask("virDomainCheckpointDelete", made.delete)

    def _described_checkpoint(self, name: str) -> str | None:
        """How libvirt describes a checkpoint; None where it knows of none."""
        known = self._checkpoint(name)
        if known is None:
            return None
        return str(self._ask("virDomainCheckpointGetXMLDesc", known.getXMLDesc))

    def _checkpoint(self, name: str) -> Any:
        """Libvirt's checkpoint; None where it knows of none."""
        library = self._connection.library

        def look_up() -> Any:
            try:
                return self._domain.checkpointLookupByName(name)
            except library.libvirtError as error:
                if error.get_error_code() == library.VIR_ERR_NO_DOMAIN_CHECKPOINT:
                    return None
                raise

        return self._ask("virDomainCheckpointLookupByName", look_up)

    # What can be changed

    def why_not_writable(self, node: BlockNode) -> str | None:
        """See :class:`chainmerge.live.port.InspectedVm`.

        libvirt gives its QEMU the permissions for what a job writes to when the job begins, so
        that only that is known which nobody can write to.
        """
        return None if node.filename is None else why_nobody_can_write(node.filename)

    def why_bitmaps_stay(self, node: BlockNode) -> str | None:
        """See :class:`chainmerge.live.port.InspectedVm`.

        libvirt reopens an image to change its bitmaps, and does not name the data file, which
        QEMU takes for another one then (seen with libvirt 9.0 and QEMU 7.2).
        """
        if node.driver != "qcow2" or node.filename is None or not data_file_places(node.filename):
            return None
        return "libvirt cannot change bitmaps of an image whose data is in another file"

    # The job

    def job(self, job: str) -> JobState | None:  # noqa: ARG002  # libvirt has one a disk
        """How the disk's merge is, whatever name it was to have; None where there is none."""
        found = self.block_job()
        if found is None or not (found.is_commit or found.kind is DomainJobKind.PULL):
            return None
        phase = JobPhase.READY if found.caught_up else JobPhase.RUNNING
        return JobState(phase, found.done, found.total)

    def described_job(self, job: str) -> str:
        """What a job on this disk does; libvirt has no more than one, without a name."""
        return f"{job} of {self._disk} (virsh blockjob {self._domain_name} {self._disk})"

    def block_job(self) -> DomainJob | None:
        """The disk's block job, whoever began it."""
        library = self._connection.library
        flags = library.VIR_DOMAIN_BLOCK_JOB_INFO_BANDWIDTH_BYTES
        found = self._ask(
            "virDomainGetBlockJobInfo", lambda: self._domain.blockJobInfo(self._disk, flags)
        )
        if not found:
            return None
        kinds = {
            library.VIR_DOMAIN_BLOCK_JOB_TYPE_COMMIT: DomainJobKind.COMMIT,
            library.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT: DomainJobKind.ACTIVE_COMMIT,
            library.VIR_DOMAIN_BLOCK_JOB_TYPE_PULL: DomainJobKind.PULL,
            library.VIR_DOMAIN_BLOCK_JOB_TYPE_COPY: DomainJobKind.COPY,
            library.VIR_DOMAIN_BLOCK_JOB_TYPE_BACKUP: DomainJobKind.BACKUP,
        }
        kind = kinds.get(found["type"], DomainJobKind.OTHER)
        return DomainJob(kind, int(found["cur"]), int(found["end"]))

    def start_commit(self, top: BlockNode, base: BlockNode, bandwidth: int | None) -> None:
        """Begin to merge; libvirt unites the bitmaps and moves the disk's description with it.

        Args:
            top: the uppermost image to merge.
            base: the one to merge into.
            bandwidth: bytes a second; None for no limit.
        """
        library = self._connection.library
        flags = library.VIR_DOMAIN_BLOCK_COMMIT_BANDWIDTH_BYTES
        if not top.read_only:
            flags |= library.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE
        elif self._is_named_relatively(base):
            flags |= library.VIR_DOMAIN_BLOCK_COMMIT_RELATIVE
        self._ask(
            "virDomainBlockCommit",
            lambda: self._domain.blockCommit(
                self._disk, base.name, top.name, bandwidth or 0, flags
            ),
        )

    def start_pull(self, onto: BlockNode | None, bandwidth: int | None) -> None:
        """Begin to pull up into the active image; libvirt unites the bitmaps, as above.

        Args:
            onto: the image that it stands on afterwards; None for none.
            bandwidth: bytes a second; None for no limit.
        """
        library = self._connection.library
        if onto is None:
            flags = library.VIR_DOMAIN_BLOCK_PULL_BANDWIDTH_BYTES
            self._ask(
                "virDomainBlockPull",
                lambda: self._domain.blockPull(self._disk, bandwidth or 0, flags),
            )
            return
        flags = library.VIR_DOMAIN_BLOCK_REBASE_BANDWIDTH_BYTES
        if self._is_named_relatively(onto):
            flags |= library.VIR_DOMAIN_BLOCK_REBASE_RELATIVE
        self._ask(
            "virDomainBlockRebase",
            lambda: self._domain.blockRebase(self._disk, onto.name, bandwidth or 0, flags),
        )

    def limit_job(self, bandwidth: int | None) -> None:
        """Have the disk's block job copy at most so many bytes a second; None for no limit."""
        flag = self._connection.library.VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES
        self._ask(
            "virDomainBlockJobSetSpeed",
            lambda: self._domain.blockJobSetSpeed(self._disk, bandwidth or 0, flag),
        )

    def _is_named_relatively(self, base: BlockNode) -> bool:
        """Whether all images above base name the next one without a directory's full path."""
        for layer in self._layers():
            if layer.target == base.name:
                return True
            name = layer.backing_name()
            if name is None or name.startswith("/"):
                return False
        return False

    def pivot(self) -> None:
        """Have the domain go on with base; returns when it does.

        That its job is ready libvirt hears some time after everything has been copied.
        """
        library = self._connection.library
        flag = library.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT
        for looks_left in reversed(range(_LOOKS_FOR_READINESS)):
            try:
                self._ask(
                    "virDomainBlockJobAbort", lambda: self._domain.blockJobAbort(self._disk, flag)
                )
            except VmRefused as refused:
                if not looks_left or _code_of(refused) != library.VIR_ERR_BLOCK_COPY_ACTIVE:
                    raise
                self.wait_for_event(_SECONDS_BETWEEN_LOOKS)
            else:
                return

    def cancel(self) -> None:
        """End the job, with nothing taking effect."""
        self._ask("virDomainBlockJobAbort", lambda: self._domain.blockJobAbort(self._disk, 0))

    # The guest

    def is_suspended(self) -> bool:
        """Whether the guest does not run, though its QEMU does."""
        state, _ = self._ask("virDomainGetState", self._domain.state)
        return bool(state == self._connection.library.VIR_DOMAIN_PAUSED)

    def suspend(self) -> None:
        """Stop the guest. What it had asked of its disk is done when this returns."""
        self._ask("virDomainSuspend", self._domain.suspend)

    def let_run(self) -> None:
        """Have the guest go on."""
        self._ask("virDomainResume", self._domain.resume)

    def disk_limits(self) -> DiskLimits:
        """How the guest's disk is limited now."""
        found = self._ask("virDomainGetBlockIoTune", lambda: self._domain.blockIoTune(self._disk))
        limits = {name: int(found[theirs]) for name, theirs in _LIMITS.items() if theirs in found}
        return DiskLimits(limits, found.get("group_name"))

    def limit_disk(self, limits: DiskLimits) -> None:
        """Limit the guest's disk."""
        # libvirt wants no length of a burst where there is no burst.
        wanted = {
            _LIMITS[name]: value
            for name, value in limits.limits.items()
            if value or not name.endswith("_length")
        }
        library = self._connection.library
        self._ask(
            "virDomainSetBlockIoTune",
            lambda: self._domain.setBlockIoTune(self._disk, wanted, library.VIR_DOMAIN_AFFECT_LIVE),
        )

    # Space

    def set_write_threshold(self, node: str, offset: int) -> None:
        """Have libvirt tell those who listen once a protocol node is written to behind *offset*."""
        layer = layer_above_protocol(node)
        self._ask(
            "virDomainSetBlockThreshold", lambda: self._domain.setBlockThreshold(layer, offset)
        )

    def highest_write(self, node: str) -> int:
        """The end of the highest write to a protocol node since it was opened."""
        index = index_of(layer_above_protocol(node))
        stats = self._connection.domain_stats()
        for number in range(int(stats.get("block.count", 0))):
            if stats.get(f"block.{number}.name") != self._disk:
                continue
            if str(stats.get(f"block.{number}.backingIndex", "")) == index:
                return int(stats.get(f"block.{number}.allocation", 0))
        return 0

    def rest(self, seconds: float) -> None:
        """As :meth:`wait_for_event`: libvirt serves many at a time."""
        self.wait_for_event(seconds)

    def let_others_in(self) -> None:
        """Nothing has to be done: libvirt serves many at a time."""

    def wait_for_event(self, seconds: float) -> None:
        """Wait for so many seconds; libvirt is asked how things are, it does not call."""
        self._timer.wait(seconds)

    _timer: Final = Event()

    @property
    def _domain(self) -> Any:
        return self._connection.domain

    def _ask(self, what: str, request: Any) -> Any:
        return self._connection.ask(what, request)


def _code_of(refused: VmRefused) -> int | None:
    """The number of libvirt's error behind one of ours."""
    code = getattr(refused.__cause__, "get_error_code", None)
    return None if code is None else int(code())
