# SPDX-License-Identifier: Apache-2.0
"""Why an image's metadata is not rewritten, and what holds when a rewrite fails.

::

    Refused          BitmapSetUnfit, BackingNameUnfit, HeaderFull, RefcountTableFull
                     NotEnoughSpace
    Failed           RewriteFailed    before the switch: the image is the old one
                     ReleaseFailed    after the switch: the image is the new one
    OutcomeUnknown   SwitchUnknown    at the switch: it is one of the two

That an image must be repaired before anything is written to it is for
:mod:`chainmerge.planning.errors` to say: a plan refuses it for the same reasons.
"""

from __future__ import annotations

from typing import ClassVar

from chainmerge.errors import Failed, NoSpace, OutcomeUnknown, Refused


class BitmapSetUnfit(Refused):
    """The image cannot store this set of bitmaps so that QEMU reads it."""

    code: ClassVar[str] = "bitmap-set-unfit"
    template: ClassVar[str] = "{image}: cannot hold these bitmaps: {problem}"
    hint: ClassVar[str] = (
        "for a version 2 image, 'qemu-img amend -o compat=1.1 {image}' makes it able to hold "
        "bitmaps; otherwise give the new bitmap another name or a coarser granularity"
    )
    explanation: ClassVar[str] = (
        "Bitmaps can only be stored in qcow2 images of version 3, under distinct names of at most "
        "1023 bytes, with a granularity of 512 bytes to 2 GiB, and with exactly the bits that the "
        "disk's present size needs. QEMU does not open an image that breaks one of these rules. "
        "Nothing was written."
    )
    image: str
    problem: str


class HeaderFull(Refused):
    """The header cannot be laid out so that one sector write switches to it."""

    code: ClassVar[str] = "header-full"
    template: ClassVar[str] = (
        "{image}: no room in the header: the extensions and the backing file name take {needed} "
        "bytes of a header cluster of {cluster_size}, and what changes must fit in its first 512"
    )
    hint: ClassVar[str] = (
        "shorten the names that the header holds (backing file, external data file), for example "
        "with a relative name or a symbolic link"
    )
    explanation: ClassVar[str] = (
        "Bitmaps and backing file names are switched from old to new by writing the first 512 "
        "bytes of the image, which a disk does entirely or not at all. Everything that must change "
        "at that moment has to be in those bytes, and whatever lies after them must be writable "
        "beforehand without disturbing the present header. With very long names, or header "
        "extensions of other programs, no such layout exists. Nothing was written."
    )
    image: str
    needed: int
    cluster_size: int


class BackingNameUnfit(Refused):
    """QEMU could not read such a backing name or format."""

    code: ClassVar[str] = "backing-name-unfit"
    template: ClassVar[str] = "{image}: {value!r} cannot be its backing {what}: {problem}"
    hint: ClassVar[str] = "use another name, for example a relative one, which is shorter"
    explanation: ClassVar[str] = (
        "An image stores the name of its backing file in at most 1023 bytes, and the name of that "
        "file's format in at most 15. An image with an external data file that must be a plain "
        "raw copy of the disk cannot have a backing file at all. Nothing was written."
    )
    image: str
    what: str
    value: str
    problem: str


class RefcountTableFull(Refused):
    """The image's refcounts cannot describe any more clusters."""

    code: ClassVar[str] = "refcount-table-full"
    template: ClassVar[str] = (
        "{image}: its refcount table would have to grow beyond the {limit} bytes that QEMU reads"
    )
    hint: ClassVar[str] = (
        "copy the image with 'qemu-img convert' to one with larger clusters, and keep it: its "
        "bitmaps and internal snapshots are not in the copy"
    )
    explanation: ClassVar[str] = (
        "With small clusters and wide refcounts a qcow2 file can reach a size where no further "
        "cluster can be counted: QEMU reads at most 8 MiB of refcount table. Nothing was written."
    )
    image: str
    limit: int


class NotEnoughSpace(NoSpace, Refused):
    """There is no room for the new metadata beside the old."""

    code: ClassVar[str] = "metadata-space-missing"
    template: ClassVar[str] = (
        "{image}: no room for new metadata beside the old: {missing} more bytes are needed"
    )
    hint: ClassVar[str] = (
        "extend the volume or free space on the file system, then run the command again"
    )
    explanation: ClassVar[str] = (
        "New bitmaps are written beside the old ones, which are freed afterwards, so that a crash "
        "leaves one set or the other. All the space is reserved before the first write, and there "
        "was not enough. Nothing was written. If earlier attempts were interrupted, 'chainmerge "
        "repair' gives back the clusters that they left."
    )
    image: str
    missing: int


class RewriteFailed(Failed):
    """New metadata could not be written; the old one is untouched."""

    code: ClassVar[str] = "metadata-rewrite-failed"
    template: ClassVar[str] = "{image}: could not write new metadata ({step}): {reason}"
    hint: ClassVar[str] = (
        "look for I/O errors in the kernel log ('dmesg'), then run the same command again"
    )
    explanation: ClassVar[str] = (
        "The image still holds its old metadata, unchanged: what failed was the preparation of the "
        "new one in clusters that are not in use. A few clusters may be marked as used although "
        "nothing uses them; 'chainmerge repair' gives them back. Running the command again is safe."
    )
    image: str
    step: str
    reason: str


class SwitchUnknown(OutcomeUnknown):
    """The write that switches the metadata failed or may not have become durable."""

    code: ClassVar[str] = "metadata-switch-unknown"
    template: ClassVar[str] = (
        "{image}: cannot tell whether the switch to the new metadata took effect: {reason}"
    )
    hint: ClassVar[str] = (
        "look at the kernel log ('dmesg'); once the storage works, run the same command again: it "
        "reads from the image which of the two is in effect"
    )
    explanation: ClassVar[str] = (
        "The old and the new metadata are both complete in the image, and its first sector says "
        "which one counts. Writing that sector, or making it durable, failed, so the image is "
        "entirely in its old or entirely in its new state. Both are safe to go on from."
    )
    image: str
    reason: str


class ReleaseFailed(Failed):
    """The new metadata is in effect; the clusters of the old could not be marked free."""

    code: ClassVar[str] = "metadata-release-failed"
    template: ClassVar[str] = (
        "{image}: the new metadata is in effect, but the clusters of the old metadata could not be "
        "freed: {reason}"
    )
    hint: ClassVar[str] = (
        "look for I/O errors in the kernel log ('dmesg'), then run 'chainmerge repair {image}', "
        "which shows the clusters, and with --yes frees them"
    )
    explanation: ClassVar[str] = (
        "The switch to the new metadata is complete and durable. Only the clusters of the old "
        "metadata are still marked as used, which costs space and nothing else."
    )
    image: str
    reason: str
