# SPDX-License-Identifier: Apache-2.0
"""Facts of a merge without an image on disk: a healthy one, and ways to make it differ.

The planner is pure, so a situation is a value. :func:`merge_of` gives a merge that nothing speaks
against: images of one directory, one upon the other, each with a valid bitmap ``cp1``, committed
by the native engine into a file that can grow. A test changes what its situation is about, by
``msgspec.structs.replace`` or by the functions here.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from chainmerge.bitmaps.rules import (
    BitmapState,
    Decision,
    Fate,
    LayerBitmaps,
    Occurrence,
    decide,
)
from chainmerge.chain.model import Chain, ImageFormat, ImageInfo
from chainmerge.chain.relatives import Relatives
from chainmerge.documents.images import Searched
from chainmerge.documents.plan import EngineName, Movement
from chainmerge.options import Direction, Placement
from chainmerge.planning.facts import Evidence, ImageTimes, MergeFacts, SnapshotViews, SpaceFacts
from chainmerge.planning.removals import Removals
from chainmerge.qcow2.bitmaps import BitmapEntry, BitmapFlag
from chainmerge.qcow2.bits import BitSet
from chainmerge.qcow2.check import CheckReport
from chainmerge.qcow2.features import (
    Autoclear,
    Compatible,
    Compression,
    CryptMethod,
    Incompatible,
)
from chainmerge.qcow2.header import V3_HEADER_LENGTH, Header
from chainmerge.qcow2.runs import NO_RUNS
from chainmerge.storage.volume_facts import VolumeFacts, VolumeKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainmerge.errors import ChainmergeError

MIB: Final = 1 << 20
GIB: Final = 1 << 30
DISK: Final = 10 * GIB
"""Bytes of every guest's disk that nothing else is said of."""
FILE_SIZE: Final = GIB
NEEDED: Final = FILE_SIZE + 64 * MIB
"""What base needs with data in new clusters."""
NEEDED_IN_PLACE: Final = FILE_SIZE + 16 * MIB
VM: Final = Path("/machines/vm")
CHECKPOINT: Final = "cp1"
HOUR: Final = 3600 * 10**9
NOON: Final = 1_700_000_000 * 10**9
"""A moment, in nanoseconds since 1970."""
_FILE_SYSTEM: Final = 2049
_GRANULARITY: Final = 65536


def header(**differences: Any) -> Header:
    """The header of a clean qcow2 image of version 3, with differences."""
    usual: dict[str, Any] = {
        "version": 3,
        "backing_name_offset": 0,
        "backing_name_length": 0,
        "cluster_bits": 16,
        "virtual_size": DISK,
        "crypt_method": CryptMethod.NONE,
        "l1_size": 20,
        "l1_table_offset": 0x30000,
        "refcount_table_offset": 0x10000,
        "refcount_table_clusters": 1,
        "snapshot_count": 0,
        "snapshots_offset": 0,
        "incompatible": Incompatible(0),
        "compatible": Compatible(0),
        "autoclear": Autoclear.BITMAPS,
        "refcount_order": 4,
        "header_length": V3_HEADER_LENGTH,
        "compression_type": Compression.ZLIB,
        "extra": b"",
        "extensions": (),
        "backing_name": None,
        "backing_format": None,
        "data_file_name": None,
    }
    return Header(**{**usual, **differences})


def qcow2(path: Path, backing: Path | None = None, **differences: Any) -> ImageInfo:
    """A qcow2 image that names its backing file by a relative name, with differences."""
    name = None if backing is None else backing.name
    image = ImageInfo(
        path=path,
        real_path=path,
        identity=(_FILE_SYSTEM, zlib.crc32(bytes(path))),
        is_block_device=False,
        format=ImageFormat.QCOW2,
        format_declared=True,
        header=header(
            backing_name=name, backing_format=None if backing is None else ImageFormat.QCOW2
        ),
        file_size=FILE_SIZE,
        guest_size=DISK,
        backing_name=name,
        backing=backing,
    )
    return replace(image, **differences)


RAW: Final[dict[str, Any]] = {"format": ImageFormat.RAW, "header": None}
"""What makes an image a raw one."""
DEVICE: Final[dict[str, Any]] = {"is_block_device": True}
"""What makes it lie on a block device."""


def bitmap_entry(name: str) -> BitmapEntry:
    """A bitmap as the directory of an image lists it."""
    return BitmapEntry(name, _GRANULARITY, BitmapFlag.AUTO, 0x50000, 1, b"", 1)


def decided(
    *states: str, name: str = CHECKPOINT, base_index: int = 0, above: bool = False, **about: bool
) -> Decision:
    """What the rules say of one bitmap name.

    Args:
        states: its state in each image, from the root to top.
        name: the name.
        base_index: which of the images is base.
        above: whether an image above top has the name.
        about: ``base_holds=False`` where base cannot hold bitmaps, ``top_stays=True`` where top is
            left where it is.
    """
    layers = [
        LayerBitmaps(
            f"image{index}",
            {name: Occurrence(BitmapState(state), _GRANULARITY, None)},
            supports_bitmaps=about.get("base_holds", True) or index != base_index,
        )
        for index, state in enumerate(states)
    ]
    names_above = {name} if above else set()
    (decision,) = decide(layers, base_index, names_above, top_stays=about.get("top_stays", False))
    return decision


def bits_of(decisions: Sequence[Decision], disk: int = DISK) -> dict[str, BitSet]:
    """For each name that is kept one dirty bit."""
    return {
        one.name: BitSet.from_ranges([(0, 1)], disk, _GRANULARITY)
        for one in decisions
        if one.fate is Fate.KEEP
    }


NO_RELATIVES: Final = Relatives(
    siblings=(),
    middle_children=(),
    children=(),
    beside=(),
    above=(),
    unreadable=(),
    unknown=frozenset(),
    searched=Searched(directories=(str(VM),)),
)

FILE: Final = VolumeFacts(
    path=str(VM / "base.qcow2"),
    kind=VolumeKind.FILE,
    size=FILE_SIZE,
    capacity_limit=None,
    free_bytes=100 * GIB,
    growth_unit=1,
    pool="file system 2049",
)
"""What base lies on: a file on a file system that has room."""
LVM: Final = replace(
    FILE,
    kind=VolumeKind.LVM,
    size=4 * GIB,
    capacity_limit=8 * GIB,
    free_bytes=None,
    growth_unit=4 * MIB,
    pool="volume group vg",
)
FIXED_DEVICE: Final = replace(
    FILE, kind=VolumeKind.BLOCK, size=4 * GIB, capacity_limit=4 * GIB, free_bytes=None, pool=""
)


def space(required: int, **differences: Any) -> SpaceFacts:
    """What base needs where an engine knows it exactly, with differences."""
    usual = SpaceFacts(
        image_end=FILE_SIZE,
        required=required,
        optimal=required,
        breakdown={"guest data": required - FILE_SIZE},
        new_clusters=512,
        new_l2_tables=1,
        written=48 * MIB,
        allocates=required - FILE_SIZE,
        end_after=required,
    )
    return replace(usual, **differences)


SOUND: Final = CheckReport(
    image="base",
    corruptions=0,
    leaks=0,
    overlaps=0,
    copied_mismatches=0,
    complete=True,
    image_end_offset=FILE_SIZE,
    leaked=NO_RUNS,
    messages=(),
)


def names_of_chain(overlays: int, below: int = 0) -> list[str]:
    """File names from the root to top."""
    return [
        *(f"root{index}" for index in range(below)),
        "base",
        *(f"mid{index}" for index in range(1, overlays)),
        "top",
    ]


def merge_of(overlays: int = 1, below: int = 0, **differences: Any) -> MergeFacts:
    """A merge that nothing speaks against.

    Args:
        overlays: how many images are merged into base.
        below: how many base stands on.
        differences: facts that are others.
    """
    images: list[ImageInfo] = []
    for name in names_of_chain(overlays, below):
        images.append(qcow2(VM / f"{name}.qcow2", images[-1].path if images else None))
    decision = decided(*["valid"] * len(images), base_index=below)
    usual: dict[str, Any] = {
        "chain": Chain(tuple(images)),
        "base_index": below,
        "relatives": NO_RELATIVES,
        "decisions": (decision,),
        "final_bits": bits_of([decision]),
        "recovered": frozenset(),
        "interrupted": False,
        "result_check": SOUND,
        "movement": Movement(data_bytes=48 * MIB, zero_bytes=MIB, compressed_bytes=0),
        "pull_bytes": 900 * MIB,
        "undefined_bytes": 32 * MIB,
        "merged": None,
        "volume": FILE,
        "engine": EngineName.NATIVE,
        "engine_reason": "base is a qcow2 image with its data in its own file",
        "direction": Direction.COMMIT,
        "pull_obstacle": None,
        "spaces": {
            Placement.COW: space(NEEDED),
            Placement.IN_PLACE: space(NEEDED_IN_PLACE),
        },
        "obstacles": (),
        "warnings": (),
    }
    return MergeFacts(**{**usual, **differences})


def pull_of(overlays: int = 1, below: int = 0, **differences: Any) -> MergeFacts:
    """The same the other way: what top lacks comes up into it."""
    return merge_of(overlays, below, **{"direction": Direction.PULL, **differences})


def with_image(facts: MergeFacts, index: int, **differences: Any) -> MergeFacts:
    """The same merge, one of whose images is another; ``header=`` takes a whole one."""
    images = list(facts.chain.images)
    images[index] = replace(images[index], **differences)
    return replace(facts, chain=Chain(tuple(images)))


def with_base(facts: MergeFacts, **differences: Any) -> MergeFacts:
    """The same merge with another base."""
    return with_image(facts, facts.base_index, **differences)


def with_top(facts: MergeFacts, **differences: Any) -> MergeFacts:
    """The same merge with another top."""
    return with_image(facts, len(facts.chain.images) - 1, **differences)


def with_relatives(facts: MergeFacts, **differences: Any) -> MergeFacts:
    """The same merge among others, which count as standing beside it where they do."""
    relatives = replace(facts.relatives, **differences)
    if "beside" not in differences:
        relatives = replace(relatives, beside=(*relatives.siblings, *relatives.middle_children))
    return replace(facts, relatives=relatives)


def with_searched(facts: MergeFacts, **differences: Any) -> MergeFacts:
    """The same merge, with users of its images looked for elsewhere."""
    return with_relatives(facts, searched=replace(facts.relatives.searched, **differences))


def with_decisions(facts: MergeFacts, *decisions: Decision) -> MergeFacts:
    """The same merge with other bitmaps."""
    return replace(facts, decisions=decisions, final_bits=bits_of(decisions))


def with_removals(facts: MergeFacts, **differences: Any) -> MergeFacts:
    """The same merge, with something known of the names that it may take away."""
    known = Removals({}, {}, {}, {})
    return replace(facts, removals=replace(known, **differences))


def snapshots_in(image: ImageInfo, *names: str, **differences: Any) -> SnapshotViews:
    """Internal snapshots that the merge leaves as they are, unless said otherwise."""
    usual = SnapshotViews(
        image=image,
        names=names,
        changed=frozenset(),
        left_by_other_way=False,
        removable=True,
        freed=MIB,
    )
    return replace(usual, **differences)


def times(facts: MergeFacts, *written: int | None, **differences: Any) -> tuple[ImageTimes, ...]:
    """When each of the images from base to top was written; created long before, bottom first."""
    images = facts.chain.images[facts.base_index :]
    return tuple(
        replace(
            ImageTimes(str(image.path), at, NOON - 1000 * HOUR + index, image.virtual_size),
            **differences,
        )
        for index, (image, at) in enumerate(zip(images, written, strict=True))
    )


def base_written_last(facts: MergeFacts, **differences: Any) -> Evidence:
    """Evidence that base is the newer one: it holds most, and was written an hour later."""
    above = len(facts.chain.images) - facts.base_index - 1
    usual = Evidence(times(facts, NOON + HOUR, *[NOON] * above), held=15, differing=1, equal=False)
    return replace(usual, **differences)


def codes_of(errors: Sequence[ChainmergeError]) -> tuple[str, ...]:
    """The errors by what they are known as."""
    return tuple(error.code for error in errors)
