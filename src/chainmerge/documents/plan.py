# SPDX-License-Identifier: Apache-2.0
"""What a merge will do, as :func:`chainmerge.plan` returns it.

The field names are also the keys that ``chainmerge plan --json`` prints: a stable interface,
versioned by :data:`~chainmerge.documents.versions.PLAN_VERSION`. All sizes are in bytes.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Final

from msgspec import Struct
from msgspec.structs import force_setattr

from chainmerge.documents.images import Searched
from chainmerge.options import Direction, Placement

if TYPE_CHECKING:
    from chainmerge.errors import ChainmergeError


class EngineName(StrEnum):
    """Who writes guest data into base."""

    NATIVE = "native"
    QEMU = "qemu"


class Role(StrEnum):
    """An image's part in the merge."""

    BELOW = "below"
    BASE = "base"
    MIDDLE = "middle"
    TOP = "top"
    ABOVE = "above"


class Progress(StrEnum):
    """How far earlier runs of the same merge got."""

    NEW = "new"
    INTERRUPTED = "interrupted"
    MERGED = "merged"


class LeakFacts(Struct, frozen=True):
    """Clusters of the result that are marked used and that nothing uses, in bytes.

    ``ours`` were left by a merge of ours, and are given back. ``others`` were left by somebody
    else; ``reclaimed`` says whether they are given back too. ``sign`` is what makes them look like
    the content of a lost L2 table, which is all that is left of it then; None if nothing does.
    """

    ours: int = 0
    others: int = 0
    sign: str | None = None
    reclaimed: bool = False


MUST_NOT_BE_USED: Final = "must not be used any more"
"""What a warning says of images that show wrong data once the merge has begun."""
NOTHING_LEAKED: Final = LeakFacts()


class PlannedImage(Struct, frozen=True):
    """One image of the chain, as the tree shows it."""

    path: str
    role: Role
    format: str
    format_declared: bool
    virtual_size: int
    file_size: int
    cluster_size: int | None
    bitmaps: int
    parent: str | None
    notes: tuple[str, ...]


class Movement(Struct, frozen=True):
    """What the merged range defines, and what of it base must newly allocate.

    The ``*_bytes`` count guest bytes by what the topmost image of the range says of
    them; ``new_clusters`` and ``new_l2_tables`` count allocations in base.
    """

    data_bytes: int
    zero_bytes: int
    compressed_bytes: int
    new_clusters: int = 0
    new_l2_tables: int = 0


class DirectionCost(Struct, frozen=True):
    """What it costs to merge in one direction: guest bytes to be read and written."""

    bytes_to_copy: int
    available: bool
    reason: str


class Directions(Struct, frozen=True):
    """Both ways to the same result: top's data down into base, or base's up into top."""

    commit: DirectionCost
    pull: DirectionCost
    chosen: str


class PlannedBitmap(Struct, frozen=True):
    """The fate of one bitmap name."""

    name: str
    fate: str
    rule: str
    reason: str
    tombstone: bool
    granularity: int | None
    dirty_bytes: int | None
    was_valid: bool
    unguarded: bool
    states: dict[str, str]
    recovered: bool

    @property
    def is_lost(self) -> bool:
        """Whether it could have served a backup, and will not any more."""
        return self.fate == "drop" and self.was_valid


class PlannedSnapshots(Struct, frozen=True):
    """The fate of an image's internal snapshots, by name.

    Attributes:
        image: The image that holds them.
        kept: Those that show the same afterwards.
        lost: Those that would show other data, or go with their image: this refuses the merge.
        dropped: Those that are deleted, as asked for.
        freed: Bytes of the image's file that nothing uses any more without them; 0 where the
            file is deleted.
    """

    image: str
    kept: tuple[str, ...]
    lost: tuple[str, ...]
    dropped: tuple[str, ...]
    freed: int


class PlannedPool(Struct, frozen=True):
    """The pool of a thin volume, in bytes.

    ``free`` and ``metadata_free`` are what it has left, ``extend_by`` what it is extended by before
    anything is written: its data, and what notes where that is.
    """

    name: str
    free: int
    metadata_free: int
    extend_by: int


class SpacePlan(Struct, frozen=True):
    """Base's volume: what it is, what it must be, what it may become.

    ``required`` is what the merge needs at its peak: exactly with the native engine, with
    QEMU's a safe upper bound. ``placement`` is where data goes that base has a cluster for,
    ``required_by_placement`` what each way takes at least, ``prune_first`` whether stale bitmaps
    have to make room first, by a switch of their own. ``grow_to`` is the size that the volume
    will be extended to, None if it is large enough. ``missing`` is what cannot be had; a plan
    with a missing byte is refused. ``allocates`` is what the file system has to give a file:
    behind its end, in holes that are written to, and for blocks that other files share, and what
    the pool has to give a thin volume at most; None for another volume, and where it is not known.
    ``pool`` is the pool of a thin volume.
    """

    kind: str
    size: int
    image_end: int
    required: int
    limit: int | None
    grow_to: int | None
    missing: int
    allocates: int | None
    breakdown: dict[str, int]
    shrink_to: int | None
    placement: Placement
    required_by_placement: dict[str, int]
    prune_first: bool
    pool: PlannedPool | None = None

    @property
    def extends_pool(self) -> bool:
        """Whether the pool is extended before anything is written."""
        return self.pool is not None and self.pool.extend_by > 0


class Repoint(Struct, frozen=True):
    """A child of top whose backing file becomes base."""

    child: str
    old_backing: str
    new_backing: str
    new_format: str


class PlannedHiding(Struct, frozen=True):
    """An overlay that gets zeros of its own before base's volume is extended.

    From ``start`` to ``end``, in guest bytes, nothing of what the volume holds there can show
    through it then. ``required`` is what its file has to have for that, in bytes.
    """

    image: str
    start: int
    end: int
    required: int


class Finding(Struct, frozen=True):
    """Something that refuses the merge, in the words of the error it would raise."""

    code: str
    sentence: str
    hint: str

    @classmethod
    def of(cls, error: ChainmergeError) -> Finding:
        """What a plan says of an error."""
        return cls(error.code, error.sentence, error.advice)


class Prediction(Struct, frozen=True):
    """How long a merge will take, by what earlier ones on the same storage took.

    Attributes:
        storage: The storage of the result, and what is read from elsewhere: a file system by its
            kind and UUID or source, volumes by the UUID of their group, or a disk.
        merges: How many earlier merges it is drawn from: on that storage, by the same engine, and
            verified alike.
        seconds: The most likely time; None if there were too few merges, and so are the others.
        at_least: What about one of ten takes less time than.
        at_most: What about one of ten takes more time than.
    """

    storage: str
    merges: int
    seconds: float | None = None
    at_least: float | None = None
    at_most: float | None = None


class MergePlan(Struct, frozen=True):
    """Everything that a merge will do. The same facts give the same plan.

    ``shared_bytes`` is what of the data that moves is not copied: the file system lets the result
    share the blocks. ``freed_bytes`` is what file systems and volume groups get back, and
    ``deletable_bytes`` what they would get back without the merged images. What those share with
    the result is in neither, and what its logical volume is extended by is subtracted.
    ``feasible`` says whether a merge by this plan would start: nothing refuses it. ``prediction``
    is how long it takes; None if nothing is to be merged, or nobody asked the history.
    """

    version: int
    base: str
    top: str
    progress: Progress
    images: tuple[PlannedImage, ...]
    engine: EngineName
    engine_reason: str
    movement: Movement
    directions: Directions
    virtual_size_before: int
    virtual_size_after: int
    bitmaps: tuple[PlannedBitmap, ...]
    snapshots: tuple[PlannedSnapshots, ...]
    space: SpacePlan
    hides: PlannedHiding | None
    repoint: tuple[Repoint, ...]
    delete: tuple[str, ...]
    rename: tuple[str, str] | None
    verify: str
    other_users: tuple[str, ...]
    searched: Searched
    refusals: tuple[Finding, ...]
    warnings: tuple[str, ...]
    leaks: LeakFacts = NOTHING_LEAKED
    shared_bytes: int = 0
    freed_bytes: int = 0
    deletable_bytes: int = 0
    feasible: bool = True
    prediction: Prediction | None = None

    def __post_init__(self) -> None:
        """Have ``feasible`` follow from the refusals, in whatever way this was made."""
        force_setattr(self, "feasible", not self.refusals)

    @property
    def pulls(self) -> bool:
        """Whether top is what is written."""
        return self.directions.chosen == Direction.PULL

    @property
    def bytes_copied(self) -> int:
        """Guest bytes that are read and written, not only shared."""
        cost = self.directions.pull if self.pulls else self.directions.commit
        return max(0, cost.bytes_to_copy - self.shared_bytes)

    @property
    def result(self) -> str:
        """The path of the image that is written, and holds everything afterwards."""
        return self.top if self.pulls else self.base

    @property
    def merged_images(self) -> tuple[PlannedImage, ...]:
        """The images that become one, base first."""
        parts = (Role.BASE, Role.MIDDLE, Role.TOP)
        return tuple(image for image in self.images if image.role in parts)

    @property
    def leaves(self) -> tuple[str, ...]:
        """The images on which no other one stands: what virtual machines use."""
        parents = {image.parent for image in self.images}
        return tuple(image.path for image in self.images if image.path not in parents)
