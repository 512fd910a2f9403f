# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a request that concerns the bitmaps of one image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from chainmerge.errors import Failed, Misuse, Refused


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
class RemovalUnsafe(Refused):
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
class ClearingUnsafe(Refused):
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
class RepairNotVerified(Failed):
    """What a repair has written is not what it should have come to."""

    code: ClassVar[str] = "repair-not-verified"
    template: ClassVar[str] = "{image} is not as it should be after the repair: {difference}"
    hint: ClassVar[str] = (
        "`chainmerge repair --undo BACKUP` puts back what was there, BACKUP being the newest "
        "file beside the image that has its name and ends in a number; look at the storage below it"
    )
    explanation: ClassVar[str] = (
        "After a repair the image is read back: its refcounts are recomputed and its bitmaps "
        "compared with what was planned. Something did not agree. What the repair has overwritten "
        "is in its backup. The tables that say what the guest sees were not changed but for flags."
    )
    image: str
    difference: str


@dataclass(eq=False)
class DisksMismatched(Misuse):
    """Tops and bases of several disks do not pair up."""

    code: ClassVar[str] = "disks-mismatched"
    template: ClassVar[str] = "there are {tops} tops and {bases} bases"
    hint: ClassVar[str] = "give --base once for each top, in the same order, or not at all"
    explanation: ClassVar[str] = (
        "Several disks are merged as one operation: each top into an image below it, which is its "
        "backing file unless a base is named. Bases are named for all disks or for none."
    )
    tops: int
    bases: int


@dataclass(eq=False)
class DiskGone(Refused):
    """The overlay of one of several disks is not there, and nothing tells that it was merged."""

    code: ClassVar[str] = "disk-gone"
    template: ClassVar[str] = "{top}, one of {count} disks, is not there"
    hint: ClassVar[str] = (
        "find out what became of it; the other disks can be merged without it: `{others}`"
    )
    explanation: ClassVar[str] = (
        "Several disks are merged as one operation, so that a snapshot goes from all of them. The "
        "overlay of one disk does not exist, and no record tells that it was merged and deleted. "
        "Perhaps somebody has deleted or moved it. Nothing was changed."
    )
    top: str
    count: int
    others: str


@dataclass(eq=False)
class DisksShareImage(Refused):
    """Two of several disks have an image in common that would be written to."""

    code: ClassVar[str] = "disks-share-image"
    template: ClassVar[str] = "{image} is part of the chains of {first} and of {second}"
    hint: ClassVar[str] = (
        "merge them one after the other; or into images below that they do not have in common"
    )
    explanation: ClassVar[str] = (
        "Several disks are merged as one operation only if they have nothing to do with each "
        "other: what is planned for one must still hold when another one was merged. Images that "
        "are only read, such as a common root, may be shared. Nothing was changed."
    )
    image: str
    first: str
    second: str


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


@dataclass(eq=False)
class RelinkUncheckable(Refused):
    """What the image shows on its old backing file cannot be read."""

    code: ClassVar[str] = "relink-uncheckable"
    template: ClassVar[str] = "what {image} shows today cannot be read: {reason}"
    hint: ClassVar[str] = (
        "if the old backing file is still somewhere, bring it back to its place for the "
        "comparison; only if you know that the new one has the same content, add --unchecked"
    )
    explanation: ClassVar[str] = (
        "An overlay holds only what was written since the snapshot; everything else comes from "
        "its backing file. With another content below it the guest's disk is destroyed, and "
        "nothing in the images tells. So both are compared, unless you say that they are the same. "
        "Nothing was changed."
    )
    image: str
    reason: str


@dataclass(eq=False)
class RelinkChangesContent(Refused):
    """The image would show other data on the new backing file."""

    code: ClassVar[str] = "relink-changes-content"
    template: ClassVar[str] = (
        "{image} would not show the same on {backing}: guest byte {offset} of {what} differs"
    )
    hint: ClassVar[str] = (
        "look for the file that {image} was made on; `chainmerge relink {image}` names files that "
        "could be it"
    )
    explanation: ClassVar[str] = (
        "What the image shows on its old backing file and on the new one was compared, and is not "
        "the same. The guest would find another disk. Nothing was changed."
    )
    image: str
    backing: str
    offset: int
    what: str


@dataclass(eq=False)
class RelinkChangesCheckpoints(Refused):
    """A checkpoint would be worth something else on the new backing file."""

    code: ClassVar[str] = "relink-changes-checkpoints"
    template: ClassVar[str] = (
        "on {backing} the bitmaps {names} of the chain of {image} would be worth something else"
    )
    hint: ClassVar[str] = (
        "use a copy that has the bitmaps of the old backing file (cp, not qemu-img convert); or "
        "give those checkpoints up: remove the bitmaps from the images above and from {image} "
        "(chainmerge bitmaps remove), the active image first, then run this again, and let the "
        "next backup be a full one"
    )
    explanation: ClassVar[str] = (
        "A backup takes the bits of a checkpoint from the active image and from the images below "
        "it that have it, too. The new backing file has the same data, but not the same bitmaps: "
        "a checkpoint would lose bits, so that the next incremental backup misses data, or it "
        "could not be used any more. Nothing was changed."
    )
    image: str
    backing: str
    names: str


@dataclass(eq=False)
class RelinkUnfinished(Refused):
    """A merge in which the image takes part did not come to its end."""

    code: ClassVar[str] = "relink-unfinished-merge"
    template: ClassVar[str] = (
        "{image} takes part in a merge into {base} that did not come to its end ({file})"
    )
    hint: ClassVar[str] = "`chainmerge status {image}` says how to finish it; do that first"
    explanation: ClassVar[str] = (
        "A merge that was interrupted is finished by looking at what the images stand on. With "
        "another backing file under one of them that would come out wrong. Nothing was changed."
    )
    image: str
    base: str
    file: str


@dataclass(eq=False)
class RelinkIncomplete(Failed):
    """The header does not say what was written."""

    code: ClassVar[str] = "relink-incomplete"
    template: ClassVar[str] = "{image} names {found!r} as its backing file after the change"
    hint: ClassVar[str] = "look at the storage below {image}, and run the same command again"
    explanation: ClassVar[str] = (
        "The image's header was written and read back, and does not hold what was written. The "
        "image's data is untouched."
    )
    image: str
    found: str
