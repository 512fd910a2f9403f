# SPDX-License-Identifier: Apache-2.0
"""Why bitmaps were not changed."""

from __future__ import annotations

from typing import ClassVar

from chainmerge.errors import Failed, NeededByOthers, Refused


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


class BitmapExists(Refused):
    """A bitmap of that name already exists."""

    code: ClassVar[str] = "bitmap-exists"
    template: ClassVar[str] = "{image} already has a bitmap {name!r}"
    hint: ClassVar[str] = (
        "choose another name: the existing bitmap may be a checkpoint that backups build on"
    )
    explanation: ClassVar[str] = (
        "The names of an image's bitmaps are unique. An existing bitmap is not replaced by an "
        "empty one, because the checkpoint that it stands for would be lost."
    )
    image: str
    name: str


class BitmapMissing(Refused):
    """There is no bitmap of that name."""

    code: ClassVar[str] = "bitmap-missing"
    template: ClassVar[str] = "{image} has no bitmap {name!r}"
    hint: ClassVar[str] = "`chainmerge bitmaps list {image}` shows those that it has"
    explanation: ClassVar[str] = (
        "Names are compared byte by byte. A name that begins with a dash must come after a "
        "separate `--`."
    )
    image: str
    name: str


class BitmapWorthless(Refused):
    """The bitmap's content means nothing."""

    code: ClassVar[str] = "bitmap-in-use"
    template: ClassVar[str] = (
        "bitmap {name!r} of {image} is inconsistent (in-use): its content is worthless"
    )
    hint: ClassVar[str] = (
        "`chainmerge bitmaps repair LEAF`, LEAF being the active image, shows it, asks, and drops "
        "it from the whole chain; the next backup must be a full one"
    )
    explanation: ClassVar[str] = (
        "A bitmap is marked in-use while a program has the image open for writing. When that "
        "program dies, the mark stays, and the bitmap misses what was written."
    )
    image: str
    name: str


class BrokenBitmapsInTheWay(Refused):
    """Other bitmaps of the image are broken and would have to be kept so."""

    code: ClassVar[str] = "broken-bitmaps-in-the-way"
    template: ClassVar[str] = "{image} holds inconsistent (in-use) bitmaps: {names}"
    hint: ClassVar[str] = (
        "`chainmerge bitmaps repair LEAF`, LEAF being the active image, shows them, asks, and "
        "drops them from the whole chain; the next backup must be a full one"
    )
    explanation: ClassVar[str] = (
        "All bitmaps of an image are replaced by one switch. A broken one cannot be stored again, "
        "because its content means nothing. Removing it is a separate decision: the next backup "
        "that builds on it must then be a full one."
    )
    image: str
    names: str


class RemovalUnsafe(NeededByOthers, Refused):
    """Removing the bitmap would make a broken checkpoint look whole."""

    code: ClassVar[str] = "removal-unsafe"
    template: ClassVar[str] = (
        "with {names} removed from {image}, the bitmap of the same name in {above} would pass for "
        "a whole checkpoint"
    )
    hint: ClassVar[str] = (
        "remove the name from the images above first, the active image first; "
        "`chainmerge bitmaps repair LEAF`, LEAF being the active image, does that for unusable ones"
    )
    explanation: ClassVar[str] = (
        "A checkpoint's bits are spread over the images of a chain. A backup trusts them if the "
        "name is valid in the active image and in consecutive images below. If a lower image alone "
        "loses the name, the rest still passes that test, and the next incremental backup misses "
        "what the removed bitmap had recorded. --force removes it anyway: the next backup must "
        "then be a full one."
    )
    image: str
    names: str
    above: str


class ClearingUnsafe(NeededByOthers, Refused):
    """Clearing the bitmap would leave a checkpoint that misses what it had recorded."""

    code: ClassVar[str] = "clearing-unsafe"
    template: ClassVar[str] = (
        "bitmap {name!r} of {image} is only part of a checkpoint: {others} has the name too"
    )
    hint: ClassVar[str] = (
        "leave it as it is; if the checkpoint is no longer needed, remove the name from all "
        "images, the active image first (`chainmerge bitmaps remove IMAGE NAME`)"
    )
    explanation: ClassVar[str] = (
        "A checkpoint's bits are spread over the images of a chain, and a backup takes the union "
        "of them. If the bits of one image are cleared, the others still pass for the whole "
        "checkpoint, and the next incremental backup misses what this image had recorded. --force "
        "clears it anyway: the next backup must then be a full one."
    )
    image: str
    name: str
    others: str


class GranularityInvalid(Refused):
    """No bitmap can have this granularity."""

    code: ClassVar[str] = "granularity-invalid"
    template: ClassVar[str] = "a granularity of {granularity} bytes is not possible for {image}"
    hint: ClassVar[str] = "use a power of two from 512 bytes to 2 GiB; 64 KiB is usual"
    explanation: ClassVar[str] = (
        "Each bit stands for a power of two of guest bytes. QEMU stores at most 512 MiB of bits in "
        "one bitmap, so very large disks need a coarser granularity."
    )
    image: str
    granularity: int


class SizesDiffer(Refused):
    """Bits of one disk cannot be merged into a bitmap of a disk of another size."""

    code: ClassVar[str] = "bitmap-sizes-differ"
    template: ClassVar[str] = (
        "the disk of {source} has {source_size} bytes, that of {image} has {image_size} bytes"
    )
    hint: ClassVar[str] = "use a source and a target whose disks have the same size"
    explanation: ClassVar[str] = (
        "Bits beyond the end of the target's disk would be cut off, and the record of what was "
        "written there would be lost."
    )
    image: str
    source: str
    image_size: int
    source_size: int


class BitmapsChanged(Failed):
    """Bitmaps were changed, and then something unrelated failed."""

    code: ClassVar[str] = "bitmaps-changed"
    template: ClassVar[str] = (
        "the bitmaps of {image} were changed, but a later step failed: {reason}"
    )
    hint: ClassVar[str] = (
        "fix the cause that the message names; `chainmerge bitmaps list {image}` then shows the "
        "bitmaps, and the same command does what is left, if anything"
    )
    explanation: ClassVar[str] = (
        "The bitmaps of an image are replaced in one atomic step. That step was complete and "
        "durable. What failed came after it: reading the bitmaps back for the report, or the same "
        "change in another image of the chain."
    )
    image: str
    reason: str


class MergeToFinishFirst(Refused):
    """A merge was interrupted, and what becomes of the bitmaps is up to it."""

    code: ClassVar[str] = "merge-to-finish-first"
    template: ClassVar[str] = (
        "a merge into {base} was interrupted, and the bitmaps of {image} are part of it"
    )
    hint: ClassVar[str] = "{command}; then run this command again"
    explanation: ClassVar[str] = (
        "While a merge is unfinished, bitmaps may look broken although they are saved, and "
        "finishing the merge restores them. Dropping them now would cost checkpoints that are "
        "still good. Nothing was changed."
    )
    image: str
    base: str
    command: str


class DisksShareBitmaps(Refused):
    """Two of several disks have an image in common whose bitmaps would change."""

    code: ClassVar[str] = "disks-share-bitmaps"
    template: ClassVar[str] = "bitmaps of {image} would be pruned for {first} and for {second}"
    hint: ClassVar[str] = "name each disk once, and disks that share a backing file one by one"
    explanation: ClassVar[str] = (
        "Several disks are pruned as one operation only if they are independent of each other: "
        "what is planned for one must still hold after another was changed. Nothing was changed."
    )
    image: str
    first: str
    second: str
