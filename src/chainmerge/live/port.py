# SPDX-License-Identifier: Apache-2.0
"""What a live merge asks of a running VM, whoever stands between: a QMP socket or libvirt.

Planning needs an :class:`InspectedVm`, looking after a merge a :class:`MergingDisk`, however the VM
is reached; :mod:`chainmerge.live.qmp.driver` knows nothing but :class:`LiveVm`. Sizes and offsets
are in bytes, times in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol, TypeAlias

from msgspec import Struct

if TYPE_CHECKING:
    from chainmerge.live.nodes import BlockGraph, BlockNode


class JobPhase(StrEnum):
    """Where a job is; see ``JobStatus`` in QEMU's documentation of QMP."""

    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    """Everything is copied, and what the guest writes goes on being copied (active merges)."""
    HELD = "held"
    """Everything is copied and nothing has taken effect yet. In an active merge the guest's
    requests wait as long as this lasts."""
    ENDING = "ending"
    """It is on its way from one of the others to its end."""
    DONE = "done"


class JobState(Struct, frozen=True):
    """A job at one moment.

    Attributes:
        phase: Where it is.
        done: Guest bytes copied.
        total: Guest bytes to copy, as far as it is known: the guest adds to it.
        out_of_space: Whether it waits because the volume it writes to is full.
        stopped_by_error: Whether it waits because of an error, that one included.
        error: Why it failed, once it is done; None where it did not.
    """

    phase: JobPhase
    done: int
    total: int
    out_of_space: bool = False
    stopped_by_error: bool = False
    error: str | None = None


class RemoveBitmap(Struct, frozen=True):
    """Remove a bitmap from a node, and from the image."""

    node: str
    name: str


class ClearBitmap(Struct, frozen=True):
    """Clear all bits of a bitmap."""

    node: str
    name: str


class EnableBitmap(Struct, frozen=True):
    """Let a bitmap record from now on."""

    node: str
    name: str


class DisableBitmap(Struct, frozen=True):
    """Let a bitmap record no more. Allowed on a node that is open for reading only."""

    node: str
    name: str


class AddBitmap(Struct, frozen=True):
    """Add a persistent bitmap that does not record."""

    node: str
    name: str
    granularity: int


class MergeBitmap(Struct, frozen=True):
    """Set all bits that the bitmap of the same name on *sources* (nodes) has."""

    node: str
    name: str
    sources: tuple[str, ...]


BitmapAction: TypeAlias = (
    RemoveBitmap | ClearBitmap | EnableBitmap | DisableBitmap | AddBitmap | MergeBitmap
)


class CommitOrder(Struct, frozen=True):
    """A commit job as it is to be started.

    Attributes:
        job: Its id.
        root: The uppermost node of the disk: its active image, or a filter over it.
        top: The uppermost node that is merged.
        base: The node that is merged into.
        backing_name: What the header of the image above top is to say of its new backing file;
            None where top is the active image.
        lacks_format_node: Whether base is a raw image without a node of that format.
    """

    job: str
    root: str
    top: str
    base: str
    backing_name: str | None
    lacks_format_node: bool


class PullOrder(Struct, frozen=True):
    """A stream job as it is to be started.

    Attributes:
        job: Its id.
        top: The node that gets what it lacks, itself and no filter on it.
        onto: The node that it stands on afterwards, or the uppermost filter on that; None for none.
        backing_name: What its header is to say of that; None for none.
        lacks_format_node: Whether that is a raw image without a node of that format.
    """

    job: str
    top: str
    onto: str | None
    backing_name: str | None
    lacks_format_node: bool


class DiskLimits(Struct, frozen=True):
    """What the guest's disk may do.

    ``limits`` are by QEMU's names (``bps_wr``, ...), 0 for no limit; ``group`` is the throttle
    group that the disk belongs to.
    """

    limits: Mapping[str, int]
    group: str | None = None

    def slowed_to(self, rate: int) -> DiskLimits:
        """The same for whoever writes at most *rate* bytes a second, and no more of anything.

        A limit of reads and writes together becomes one of each: QEMU takes none beside it. Writes
        have no bursts, and QEMU wants no length of them then.
        """
        total = self.limits.get("bps", 0)
        slowest = min(one for one in (rate, total, self.limits.get("bps_wr", 0)) if one)
        lengths = ("bps_max_length", "bps_wr_max_length")
        slower = {name: value for name, value in self.limits.items() if name not in lengths}
        if total:
            for suffix in ("", "_max", "_max_length"):
                slower[f"bps_rd{suffix}"] = self.limits.get(f"bps{suffix}", 0)
            if not slower["bps_rd_max"]:
                del slower["bps_rd_max_length"]
        slower |= {"bps": 0, "bps_wr": slowest, "bps_max": 0, "bps_wr_max": 0}
        return DiskLimits(slower, self.group)


class GuestDisk(Struct, frozen=True):
    """A disk that the guest has.

    Attributes:
        name: As the options of ``chainmerge live`` call it.
        unsuited: Why nothing can be merged on it, in a few words; None if nothing is known.
    """

    name: str
    unsuited: str | None = None


class InspectedVm(Protocol):
    """What planning asks of one disk of a running VM."""

    def let_others_in(self) -> None:
        """Have others served until the next question: images are looked at, which takes long."""

    @property
    def name(self) -> str:
        """The VM, as messages call it."""

    @property
    def address(self) -> tuple[str, ...]:
        """The options of ``chainmerge live`` that lead to this disk."""

    @property
    def process(self) -> int | None:
        """The id of the VM's process on this machine; None where that cannot be told."""

    @property
    def leaves_tombstones(self) -> bool:
        """Whether base can get a tombstone; else the name goes from all images of the chain."""

    @property
    def pulls_into_middle(self) -> bool:
        """Whether an image that the guest does not write to can get what it lacks."""

    @property
    def qemu_version(self) -> tuple[int, int, int]:
        """The version of the VM's QEMU."""

    def graph(self) -> BlockGraph:
        """The block graph as it is now."""

    def layout(self) -> BlockGraph:
        """The same, and what costs time to find out, such as bitmaps, may be missing."""

    def job(self, job: str) -> JobState | None:
        """How a job is; None where there is no such job."""

    def described_job(self, job: str) -> str:
        """A job as those know it who started it: what it is called, and what kind it is of."""

    def why_not_writable(self, node: BlockNode) -> str | None:
        """Why an image that is open for reading only cannot be made writable, as a job does.

        None where nothing speaks against it, or nobody can tell. The VM, and the image, are
        afterwards what they were before.
        """

    def why_bitmaps_stay(self, node: BlockNode) -> str | None:
        """Why the bitmaps of an image cannot be changed; None where nothing speaks against it."""


class WatchedVm(Protocol):
    """What keeping a volume ahead of what is written to it asks of a running VM."""

    def set_write_threshold(self, node: str, offset: int) -> None:
        """Have those told who listen once the node is written to behind *offset*."""

    def highest_write(self, node: str) -> int:
        """The end of the highest write to a protocol node since it was opened."""


class MergingDisk(InspectedVm, WatchedVm, Protocol):
    """What every merge asks of one disk of a running VM, however it is reached.

    Every method raises :class:`chainmerge.live.errors.VmUnreachable` where the VM, or what
    stands between, does not answer, and :class:`chainmerge.live.errors.VmRefused` where it
    answers with an error.
    """

    def disk_limits(self) -> DiskLimits:
        """How the guest's disk is limited now.

        Raises VmRefused where it cannot be limited, as for a disk without a device.
        """

    def limit_disk(self, limits: DiskLimits) -> None:
        """Limit the guest's disk."""

    def wait_for_event(self, seconds: float) -> None:
        """Return when something may have happened, at the latest after so many seconds."""

    def rest(self, seconds: float) -> None:
        """The same, and others may be served meanwhile: nobody waits for us."""


class LiveVm(MergingDisk, Protocol):
    """One disk of a running VM whose jobs and bitmaps are driven command by command.

    What :meth:`layout` returns has the bitmaps, too.
    """

    def change_bitmaps(self, actions: Sequence[BitmapAction]) -> None:
        """Do all of it, or nothing.

        Bitmaps can only be changed while their node is writable, which a job makes of base; only
        :class:`DisableBitmap` and :class:`EnableBitmap` are always allowed, and stored if it
        becomes writable later.
        """

    def make_read_only(self, node: str) -> None:
        """Make an image that nobody writes to read-only, by a reopen; its bitmaps are stored.

        After a merge that was undone only: QEMU forgets options of the node that it does not
        tell.
        """

    def make_writable(self, node: str) -> None:
        """Make an image that is open for reading only writable, by a reopen.

        After a merge that was undone only, as above.
        """

    def start_commit(self, order: CommitOrder) -> None:
        """Start a job that goes as slowly as it can and stops at errors instead of failing.

        Nothing takes effect before :meth:`finalize`, and the job stays to be looked at until
        :meth:`dismiss`.
        """

    def start_pull(self, order: PullOrder) -> None:
        """As :meth:`start_commit`; what is copied is not marked in any bitmap.

        Nobody has to dismiss the job: there is none any more once it is done.
        """

    def pause(self, job: str) -> None:
        """Let the job wait. Its phase tells when it does."""

    def resume(self, job: str) -> None:
        """Let it go on, also after an error."""

    def limit(self, job: str, bandwidth: int | None) -> None:
        """Limit it to so many bytes a second."""

    def complete(self, job: str) -> None:
        """Let a job that is ready come to its end: it will be held."""

    def finalize(self, job: str) -> None:
        """Let what a held job did take effect."""

    def cancel(self, job: str) -> None:
        """End the job, with nothing taking effect."""

    def dismiss(self, job: str) -> None:
        """Forget a job that is done."""

    def name_backing_file(self, root: str, image: str, name: str) -> None:
        """Have the header of a qcow2 image name its backing file, also a qcow2 image, as *name*.

        Args:
            root: the uppermost node of the disk.
            image: the node whose header is written; the block graph stays as it is.
            name: the name to store.
        """

    def forget_node(self, node: str) -> None:
        """Close an image that nothing uses any more."""
