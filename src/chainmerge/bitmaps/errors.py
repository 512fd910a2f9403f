# SPDX-License-Identifier: Apache-2.0
"""Why bitmaps were not changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from chainmerge.errors import Failed, NeededByOthers, Refused


@dataclass(eq=False)
class BitmapsImpossible(Refused):
    """The image cannot hold bitmaps."""

    code: ClassVar[str] = "no-bitmaps-possible"
    template: ClassVar[str] = "{image} is {format}: it cannot hold bitmaps"
    hint: ClassVar[str] = "bitmaps need qcow2 version 3: `qemu-img amend -o compat=1.1 {image}`"
    explanation: ClassVar[str] = (
        "Persistent dirty bitmaps exist in qcow2 version 3 only. Raw images have no place for "
        "them, and QEMU would ignore them in a version 2 image."
    )
    image: str
    format: str


@dataclass(eq=False)
class BitmapExists(Refused):
    """A bitmap of that name is there already."""

    code: ClassVar[str] = "bitmap-exists"
    template: ClassVar[str] = "{image} has a bitmap {name!r} already"
    hint: ClassVar[str] = (
        "choose another name: what is there may be a checkpoint that backups build on"
    )
    explanation: ClassVar[str] = (
        "The names of an image's bitmaps are unique. An existing bitmap is not replaced by an "
        "empty one, because the checkpoint that it stands for would be lost."
    )
    image: str
    name: str


@dataclass(eq=False)
class BitmapMissing(Refused):
    """There is no bitmap of that name."""

    code: ClassVar[str] = "bitmap-missing"
    template: ClassVar[str] = "{image} has no bitmap {name!r}"
    hint: ClassVar[str] = "`chainmerge bitmaps list {image}` shows those that it has"
    explanation: ClassVar[str] = (
        "Names are compared byte by byte. A name that begins with a dash has to be given behind "
        "two dashes that stand alone."
    )
    image: str
    name: str


@dataclass(eq=False)
class BitmapWorthless(Refused):
    """The bitmap's content means nothing."""

    code: ClassVar[str] = "bitmap-in-use"
    template: ClassVar[str] = "the bitmap {name!r} of {image} is in-use: its content is worthless"
    hint: ClassVar[str] = (
        "`chainmerge repair {image}` shows what removing it means, and with --yes does that: the "
        "next backup that builds on it must be a full one"
    )
    explanation: ClassVar[str] = (
        "A bitmap is marked in-use while a program has the image open for writing. When that "
        "program dies, the mark stays, and what was written is not in the bitmap."
    )
    image: str
    name: str


@dataclass(eq=False)
class BrokenBitmapsInTheWay(Refused):
    """Other bitmaps of the image are broken and would have to be kept so."""

    code: ClassVar[str] = "broken-bitmaps-in-the-way"
    template: ClassVar[str] = "{image} holds broken (in-use) bitmaps: {names}"
    hint: ClassVar[str] = (
        "`chainmerge repair {image}` shows what removing them means, and with --yes does that: the "
        "next backup that builds on them must be a full one"
    )
    explanation: ClassVar[str] = (
        "All bitmaps of an image are replaced by one switch. A broken one cannot be stored again: "
        "its content means nothing. Removing it is a decision of its own, because it makes "
        "the backups that build on it full ones."
    )
    image: str
    names: str


@dataclass(eq=False)
class RemovalUnsafe(NeededByOthers, Refused):
    """Removing the bitmap would make a broken checkpoint look whole."""

    code: ClassVar[str] = "removal-unsafe"
    template: ClassVar[str] = (
        "removing {names} from {image} would make {above}, which has the same name, pass for a "
        "whole checkpoint"
    )
    hint: ClassVar[str] = (
        "remove the name from the images above first, the active image first; "
        "`chainmerge bitmaps prune --active LEAF` does that for broken ones"
    )
    explanation: ClassVar[str] = (
        "A checkpoint's bits are spread over the images of a chain. A backup trusts them if the "
        "name is valid in the active image and in consecutive images below. Taken out of a "
        "lower image alone, the rest passes that test, and the next incremental backup misses what "
        "the removed bitmap had recorded. --force removes it all the same: the next backup must "
        "be a full one then."
    )
    image: str
    names: str
    above: str


@dataclass(eq=False)
class ClearingUnsafe(NeededByOthers, Refused):
    """Clearing the bitmap would leave a checkpoint that misses what it had recorded."""

    code: ClassVar[str] = "clearing-unsafe"
    template: ClassVar[str] = (
        "the bitmap {name!r} of {image} is a part of a checkpoint only: {others} has the name, too"
    )
    hint: ClassVar[str] = (
        "leave it as it is; where the checkpoint is not needed any more, remove the name from all "
        "images, the active image first (`chainmerge bitmaps remove IMAGE NAME`)"
    )
    explanation: ClassVar[str] = (
        "A checkpoint's bits are spread over the images of a chain, and a backup takes the union "
        "of them. With those of one image cleared, the others still pass for the whole checkpoint, "
        "and the next incremental backup misses what this image had recorded. --force clears it "
        "all the same: a full backup has to come next then."
    )
    image: str
    name: str
    others: str


@dataclass(eq=False)
class GranularityInvalid(Refused):
    """No bitmap can have this granularity."""

    code: ClassVar[str] = "granularity-invalid"
    template: ClassVar[str] = "a granularity of {granularity} bytes is not possible for {image}"
    hint: ClassVar[str] = "use a power of two from 512 bytes to 2 GiB; 64 KiB is usual"
    explanation: ClassVar[str] = (
        "A bit stands for a power of two of guest bytes. QEMU stores at most 512 MiB of bits in "
        "one bitmap, so that very large disks need a coarser one."
    )
    image: str
    granularity: int


@dataclass(eq=False)
class SizesDiffer(Refused):
    """Bits of one disk cannot be merged into a bitmap of a disk of another size."""

    code: ClassVar[str] = "bitmap-sizes-differ"
    template: ClassVar[str] = (
        "{source} has a disk of {source_size} bytes, {image} one of {image_size} bytes"
    )
    hint: ClassVar[str] = "use a source and a target of disks of the same size"
    explanation: ClassVar[str] = (
        "Bits beyond the end of the target's disk would have to be cut off, and with them the "
        "record of what was written there."
    )
    image: str
    source: str
    image_size: int
    source_size: int


@dataclass(eq=False)
class BitmapsChanged(Failed):
    """Bitmaps were changed, and then something failed that has nothing to do with them."""

    code: ClassVar[str] = "bitmaps-changed"
    template: ClassVar[str] = "the bitmaps of {image} were changed, and then: {reason}"
    hint: ClassVar[str] = (
        "remove the cause that the message names; `chainmerge bitmaps list {image}` then shows "
        "what there is, and the same command does what is left, if anything is"
    )
    explanation: ClassVar[str] = (
        "The bitmaps of an image are replaced in one atomic step. It was done, and durable, when "
        "what came after it failed: to read them back for the report, or the same in another "
        "image of the chain."
    )
    image: str
    reason: str
