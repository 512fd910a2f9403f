# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a backing chain.

Names that come out of image headers are shown with ``!r``: they may hold control
characters meant for the terminal of whoever reads the message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from chainmerge.errors import ChainUnusable, ImageInvalid, ImageUnavailable, Misuse, Refused


@dataclass(eq=False)
class BackingFileMissing(ImageUnavailable, Refused):
    """An image names a backing file that cannot be opened."""

    code: ClassVar[str] = "backing-file-missing"
    template: ClassVar[str] = (
        "{image} names the backing file {name!r}, which cannot be used: {reason}"
    )
    hint: ClassVar[str] = (
        "bring the file back to that place, or make it readable; if it is elsewhere now: "
        "`chainmerge relink {image} --backing NEW`{found}"
    )
    explanation: ClassVar[str] = (
        "An overlay holds only what was written since the snapshot; everything else is read from "
        "its backing file, so without it the disk cannot be read, let alone merged. A relative "
        "name counts from the directory of the image that holds it, by the path by which that "
        "image was reached: QEMU does not resolve symbolic links first. `chainmerge relink` "
        "changes the name in the header, and compares the content where the old file can still be "
        "read. Give it the file with the same content as before: any other one corrupts the disk "
        "without a word. Without --backing it names files that could be the lost one."
    )
    image: str
    name: str
    reason: str
    found: str = ""
    """What the hint says of files that could be it."""


@dataclass(eq=False)
class BackingNameUnusable(ChainUnusable, Refused):
    """A backing name that no file can have, or that does not say which file it means."""

    code: ClassVar[str] = "backing-name-unusable"
    template: ClassVar[str] = "{image} holds the backing name {name!r}: {why}"
    hint: ClassVar[str] = (
        "find out which file is meant, and have its plain path stored: `chainmerge relink {image} "
        "--backing FILE`"
    )
    explanation: ClassVar[str] = (
        "The name of the backing file in the image's header is empty, holds a NUL byte, or is a "
        "relative name behind `file:`, which QEMU resolves against the directory in which it "
        "happens to be started. Programs disagree about which file such a name means, so it is "
        "not guessed."
    )
    image: str
    name: str
    why: str


@dataclass(eq=False)
class JsonBackingName(ChainUnusable, Refused):
    """A backing name in QEMU's json: syntax."""

    code: ClassVar[str] = "backing-name-json"
    template: ClassVar[str] = "{image} describes its backing file as {name!r}"
    hint: ClassVar[str] = (
        "if it is a local file, have its plain path stored: `chainmerge relink {image} --backing "
        "FILE`"
    )
    explanation: ClassVar[str] = (
        "A `json:` name makes QEMU build any tree of block drivers: network connections, other "
        "files, filters. An image from an untrusted source could use it to read whatever the "
        "user who merges may read. Only plain paths are followed."
    )
    image: str
    name: str


@dataclass(eq=False)
class RemoteBackingName(ChainUnusable, Refused):
    """A backing name that QEMU would hand to one of its protocol drivers."""

    code: ClassVar[str] = "backing-name-remote"
    template: ClassVar[str] = (
        "{image} names the backing file {name!r}: QEMU's protocol {protocol!r}, not a local path"
    )
    hint: ClassVar[str] = (
        "make the backing file available as a local file or block device, and have that path "
        "stored: `chainmerge relink {image} --backing FILE`"
    )
    explanation: ClassVar[str] = (
        "QEMU takes everything before a colon in front of the first slash as a protocol: `nbd:`, "
        "`http:`, `ssh:`, `rbd:`, and also local ones such as `fat:` or `host_device:`. Merging "
        "works on local files and block devices, and an image from an untrusted source must not "
        "make this machine connect anywhere. `file:` with an absolute path is accepted."
    )
    image: str
    name: str
    protocol: str


@dataclass(eq=False)
class BackingFileOutside(ChainUnusable, Refused):
    """A backing file outside the directories of the chain."""

    code: ClassVar[str] = "backing-file-outside"
    template: ClassVar[str] = (
        "{image} names the backing file {name!r}, which {how}, outside the chain's directories "
        "({directories})"
    )
    hint: ClassVar[str] = "if that is right, allow it: --allow-backing {suggestion}"
    explanation: ClassVar[str] = (
        "Images can come from people who are not trusted, and the name of the backing file is "
        "theirs to choose: /etc/shadow, another customer's disk. So the backing files of a chain "
        "must lie in the directory of the top image, as it was given or as its symbolic links "
        "resolve, and in no directory below it. Both the place that the name says and the place "
        "that it leads to through symbolic links are judged. For the nodes of block devices the "
        "second is the last symbolic link under /dev, so that /dev/VG/LV is judged as /dev/VG. "
        "--allow-backing PATH (repeatable) allows one more file, or a directory and everything "
        "below it. An image that is itself named on the command line is allowed by that."
    )
    image: str
    name: str
    how: str
    directories: str
    suggestion: str


@dataclass(eq=False)
class BackingCycle(ChainUnusable, Refused):
    """An image that is, over some steps, its own backing file."""

    code: ClassVar[str] = "backing-cycle"
    template: ClassVar[str] = (
        "{image} names the backing file {name!r}, which is {seen}, an image above it: the chain "
        "is a cycle"
    )
    hint: ClassVar[str] = (
        "find out which image the right backing file is, and have it stored: `chainmerge relink "
        "{image} --backing FILE`"
    )
    explanation: ClassVar[str] = (
        "Following the backing files never reaches an end, because one of them leads back to an "
        "image of the chain (perhaps by another name: a hard link, a symbolic link). No "
        "program can open such a chain. Usually a backing name was set by hand to the wrong file."
    )
    image: str
    name: str
    seen: str


@dataclass(eq=False)
class ChainTooLong(ChainUnusable, Refused):
    """More images than we follow."""

    code: ClassVar[str] = "chain-too-long"
    template: ClassVar[str] = "{top}: the chain has more than {limit} images"
    hint: ClassVar[str] = "merge from an image further down first"
    explanation: ClassVar[str] = (
        "Chains are followed up to a limit, which is far beyond what QEMU itself can open, so that "
        "a forged chain cannot exhaust the memory."
    )
    top: str
    limit: int


@dataclass(eq=False)
class FormatMissing(ChainUnusable, Refused):
    """A backing file without a declared format, whose content does not say what it is."""

    code: ClassVar[str] = "backing-format-missing"
    template: ClassVar[str] = (
        "{image} does not say which format its backing file {backing} has, and that is no qcow2 "
        "image"
    )
    hint: ClassVar[str] = (
        "if it is raw, say so for this command with --format {backing}=raw, or for good: "
        "`chainmerge relink {image} --backing {backing} --format {backing}=raw`"
    )
    explanation: ClassVar[str] = (
        "When the format of a backing file is not declared, QEMU looks at its first bytes. The "
        "content of a raw disk belongs to the guest, which can write the header of any other "
        "format there and so have other files of the host opened as its disk. Therefore nothing "
        "is guessed: only a file that begins as qcow2 is taken as that, with a note, and every "
        "other one needs a word from you."
    )
    image: str
    name: str
    backing: str


@dataclass(eq=False)
class TopFormatUnknown(ChainUnusable, Refused):
    """The image that the user named is not qcow2 and no format was given."""

    code: ClassVar[str] = "image-format-unknown"
    template: ClassVar[str] = "{image} is no qcow2 image (it does not begin with QFI\\xfb)"
    hint: ClassVar[str] = "if it is a raw image, say so: --format {image}=raw"
    explanation: ClassVar[str] = (
        "An image that is given without a format must be qcow2. Every file could be a raw image, "
        "so raw is never assumed."
    )
    image: str


@dataclass(eq=False)
class WrongFormat(ChainUnusable, Refused):
    """Declared (or said to be) qcow2, but the file is something else."""

    code: ClassVar[str] = "wrong-format"
    template: ClassVar[str] = (
        "{image} should be a qcow2 image, says {declared_by}, but does not begin with QFI\\xfb"
    )
    hint: ClassVar[str] = (
        "check whether it is the right file and whole: a qcow2 image that has lost its beginning "
        "must not be declared raw, it comes from a backup; what was replaced by a raw image on "
        "purpose is declared so with `chainmerge relink CHILD --backing {image} --format "
        "{image}=raw`"
    )
    explanation: ClassVar[str] = (
        "The first four bytes of every qcow2 image are QFI\\xfb. A file without them was "
        "overwritten, truncated to nothing, or is not the image that was meant."
    )
    image: str
    declared_by: str


@dataclass(eq=False)
class FormatContradiction(ChainUnusable, Refused):
    """The user's format and the one stored in the chain differ."""

    code: ClassVar[str] = "format-contradiction"
    template: ClassVar[str] = (
        "{image} is declared as {declared!r} by {child}, but --format says {given!r}"
    )
    hint: ClassVar[str] = (
        "leave --format out; the declaration is what the virtual machine goes by; where that is "
        "wrong: `chainmerge relink {child} --backing {image} --format {image}={given}`"
    )
    explanation: ClassVar[str] = (
        "The declared format is the one by which the virtual machine reads its disk. Merging by "
        "another one would mix the image's metadata into the guest's data or the other way round."
    )
    image: str
    child: str
    declared: str
    given: str


@dataclass(eq=False)
class ForeignFormat(ChainUnusable, Refused):
    """An image whose format only QEMU understands."""

    code: ClassVar[str] = "foreign-format"
    template: ClassVar[str] = "{image} is declared as {format!r}: only qcow2 and raw can be read"
    hint: ClassVar[str] = (
        "copy it with `qemu-img convert -O qcow2` to a new file, and have its child stand on that: "
        "`chainmerge relink CHILD --backing NEW --unchecked`; keep the old file until the disk has "
        "been looked at"
    )
    explanation: ClassVar[str] = (
        "chainmerge reads the qcow2 and raw formats itself, to plan and to verify. Images of other "
        "formats can be shown as part of a chain, but their size and content are not known here."
    )
    image: str
    format: str


@dataclass(eq=False)
class DataFileRefused(ChainUnusable, Refused):
    """An image keeps its guest data in another file, which nobody allowed."""

    code: ClassVar[str] = "data-file-refused"
    template: ClassVar[str] = "{image} keeps its guest data in another file, {name!r}"
    hint: ClassVar[str] = "if that is right, allow the file by its path: --allow-data-file PATH"
    explanation: ClassVar[str] = (
        "A qcow2 image can name an external data file, and an image from an untrusted source can "
        "name any file of the host there. The files must be named by the user. A relative name is "
        "resolved against the directory of the image and, as QEMU does, against the current "
        "directory; it must give one of the named files."
    )
    image: str
    name: str


@dataclass(eq=False)
class NotInChain(Misuse):
    """An image was named as a part of a chain that it is no part of."""

    code: ClassVar[str] = "not-in-chain"
    template: ClassVar[str] = "{image} is not an image of the chain of {top}"
    hint: ClassVar[str] = "`chainmerge info {top}` shows the chain"
    explanation: ClassVar[str] = (
        "Files are compared by device and inode, so symbolic and hard links to an image of the "
        "chain are recognised. This one is none of them."
    )
    image: str
    top: str


@dataclass(eq=False)
class NoBackingFile(Misuse):
    """The image is the root of its chain."""

    code: ClassVar[str] = "no-backing-file"
    template: ClassVar[str] = "{image} has no backing file: there is nothing to merge it into"
    hint: ClassVar[str] = "name the snapshot's overlay, the image above"
    explanation: ClassVar[str] = (
        "Merging moves the data of an overlay into an image below it. This image is the root of "
        "its chain."
    )
    image: str


@dataclass(eq=False)
class ActiveElsewhere(Misuse):
    """The image named as the chain's upper end does not stand on top."""

    code: ClassVar[str] = "active-elsewhere"
    template: ClassVar[str] = "the backing chain of {active} does not lead to {top}"
    hint: ClassVar[str] = (
        "name the image that the virtual machine writes to; `chainmerge info {active}` shows its "
        "chain"
    )
    explanation: ClassVar[str] = (
        "--active names the upper end of the chain, so that the images above the merged one "
        "are known. The one given belongs to another chain, or lies below."
    )
    active: str
    top: str


@dataclass(eq=False)
class TooManyFiles(Refused):
    """A directory is too large to look for other users of base."""

    code: ClassVar[str] = "too-many-files"
    template: ClassVar[str] = (
        "looking for other users of the images: more than {limit} files up to and in {directory}"
    )
    hint: ClassVar[str] = "keep the images in directories of their own"
    explanation: ClassVar[str] = (
        "An image that other images use must not be changed under them. To find those, the "
        "headers of all qcow2 files in the directories of the chain are read, up to a limit. "
        "Stopping short would mean that one could be missed."
    )
    directory: str
    limit: int


@dataclass(eq=False)
class SearchPathUnusable(Refused):
    """A directory that was to be searched cannot be read."""

    code: ClassVar[str] = "search-path-unusable"
    template: ClassVar[str] = "cannot search {path} for other users of the images: {reason}"
    hint: ClassVar[str] = "check the path and its permissions"
    explanation: ClassVar[str] = (
        "An image that other images use must not be changed under them. A directory that may hold "
        "such images and cannot be listed is no proof that there are none."
    )
    path: str
    reason: str


@dataclass(eq=False)
class ImageReplaced(ImageUnavailable, Refused):
    """The file under an image's name is not the one that was examined."""

    code: ClassVar[str] = "image-replaced"
    template: ClassVar[str] = "{image} was replaced by another file since the chain was examined"
    hint: ClassVar[str] = "make sure that nothing else works on this chain, then run again"
    explanation: ClassVar[str] = (
        "Between examining the chain and opening the image, its path came to mean another file "
        "(another inode or device). What was planned for the old one cannot be done to the new "
        "one."
    )
    image: str


@dataclass(eq=False)
class BaseNotBelowTop(Misuse):
    """Base was named, but is not below top."""

    code: ClassVar[str] = "base-not-below-top"
    template: ClassVar[str] = "{base} is not below {top} in the backing chain"
    hint: ClassVar[str] = "name the overlay first and the image to merge into with --base"
    explanation: ClassVar[str] = (
        "A merge moves the data of an overlay (top) down into an image below it (base). The two "
        "were given the wrong way round, or are the same image."
    )
    base: str
    top: str


@dataclass(eq=False)
class ImageDirty(ImageInvalid, Refused):
    """Base was not closed properly by a writer that defers refcounts."""

    code: ClassVar[str] = "image-dirty"
    template: ClassVar[str] = "{image} was not closed properly: its dirty bit is set"
    hint: ClassVar[str] = (
        "`chainmerge repair {image}` shows what is wrong, and with --yes mends it; then run this "
        "command again"
    )
    explanation: ClassVar[str] = (
        "The dirty bit (lazy refcounts) says that the refcounts on disk may be too low. Writing "
        "into the image by them would put new data over clusters that are in use."
    )
    image: str


@dataclass(eq=False)
class ImageCorrupt(ImageInvalid, Refused):
    """QEMU marked the image corrupt."""

    code: ClassVar[str] = "image-corrupt"
    template: ClassVar[str] = "{image} is marked corrupt"
    hint: ClassVar[str] = (
        "`chainmerge repair {image}` shows what is wrong and what of it can be mended; look at "
        "that before you go on"
    )
    explanation: ClassVar[str] = (
        "QEMU sets the corrupt bit when it meets metadata that contradicts itself, and refuses to "
        "write to the image from then on. Nothing may be merged into it before it is repaired."
    )
    image: str


@dataclass(eq=False)
class ImageDamaged(ImageInvalid, Refused):
    """The consistency check of an image that would be written to found corruption."""

    code: ClassVar[str] = "image-damaged"
    template: ClassVar[str] = "{image} is damaged in {corruptions} places, the first: {first}"
    hint: ClassVar[str] = (
        "`chainmerge repair {image}` shows what is wrong and what of it can be mended, and with "
        "--yes does that; then run this command again"
    )
    explanation: ClassVar[str] = (
        "The refcounts recomputed from the image's tables do not match those stored in it, or "
        "tables point where they must not. Writing to such an image can destroy data. "
        "`chainmerge check` lists what was found."
    )
    image: str
    corruptions: int
    first: str
