# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a backing chain.

Names that come out of image headers are shown with ``!r``: they may hold control
characters meant for the terminal of whoever reads the message.
"""

from __future__ import annotations

from typing import ClassVar

from chainmerge.errors import ChainUnusable, ImageInvalid, ImageUnavailable, Misuse, Refused


class BackingFileMissing(ImageUnavailable, Refused):
    """An image names a backing file that cannot be opened."""

    code: ClassVar[str] = "backing-file-missing"
    template: ClassVar[str] = (
        "{image} names the backing file {name!r}, which cannot be used: {reason}"
    )
    hint: ClassVar[str] = (
        "put the file back in that place, or make it readable; if it is elsewhere now: `chainmerge "
        "relink {image} --backing NEW --unchecked`, as nothing is left to compare it with{found}"
    )
    explanation: ClassVar[str] = (
        "An overlay holds only what was written since the snapshot; everything else is read from "
        "its backing file, so without it the disk cannot be read, let alone merged. A relative "
        "name is resolved against the directory of the image that holds it, along the path by "
        "which that image was reached: QEMU does not resolve symbolic links first. `chainmerge "
        "relink` changes the name in the header, and compares the content if the old file can "
        "still be read. Give it the file with the same content as before: any other file silently "
        "corrupts the disk. Without --backing it lists files that could be the lost one."
    )
    image: str
    name: str
    reason: str
    found: str = ""
    """What the hint says about files that could be the missing one."""


class BackingNameUnusable(ChainUnusable, Refused):
    """A backing name that no file can have, or that does not say which file it means."""

    code: ClassVar[str] = "backing-name-unusable"
    template: ClassVar[str] = "{image} holds the backing name {name!r}: {why}"
    hint: ClassVar[str] = (
        "find out which file is meant, and store its plain path: `chainmerge relink {image} "
        "--backing FILE`"
    )
    explanation: ClassVar[str] = (
        "The name of the backing file in the image's header is empty, holds a NUL byte, or is a "
        "relative name after `file:`, which QEMU resolves against the directory in which it "
        "happens to be started. Programs disagree about which file such a name means, so "
        "chainmerge does not guess."
    )
    image: str
    name: str
    why: str


class JsonBackingName(ChainUnusable, Refused):
    """A backing name in QEMU's json: syntax."""

    code: ClassVar[str] = "backing-name-json"
    template: ClassVar[str] = "{image} describes its backing file as {name!r}"
    hint: ClassVar[str] = (
        "if it is a local file, store its plain path: `chainmerge relink {image} --backing FILE`"
    )
    explanation: ClassVar[str] = (
        "A `json:` name makes QEMU build any tree of block drivers: network connections, other "
        "files, filters. An image from an untrusted source could use it to read whatever the "
        "user who merges may read. Only plain paths are followed."
    )
    image: str
    name: str


class RemoteBackingName(ChainUnusable, Refused):
    """A backing name that QEMU would hand to one of its protocol drivers."""

    code: ClassVar[str] = "backing-name-remote"
    template: ClassVar[str] = (
        "{image} names the backing file {name!r}: QEMU's protocol {protocol!r}, not a local path"
    )
    hint: ClassVar[str] = (
        "make the backing file available as a local file or block device, and store that path: "
        "`chainmerge relink {image} --backing FILE`"
    )
    explanation: ClassVar[str] = (
        "QEMU takes whatever stands before a colon, if no slash comes earlier, for a protocol: "
        "`nbd:`, `http:`, `ssh:`, `rbd:`, and also local ones such as `fat:` or `host_device:`. "
        "Merging works on local files and block devices, and an image from an untrusted source "
        "must not make this machine connect anywhere. `file:` with an absolute path is accepted."
    )
    image: str
    name: str
    protocol: str


class BackingFileOutside(ChainUnusable, Refused):
    """A backing file outside the directories of the chain."""

    code: ClassVar[str] = "backing-file-outside"
    template: ClassVar[str] = (
        "{image} names the backing file {name!r}, which {how}, outside the chain's directories "
        "({directories})"
    )
    hint: ClassVar[str] = "if that is right, allow it: --allow-backing {suggestion}"
    explanation: ClassVar[str] = (
        "Images can come from people who are not trusted, who can choose any backing file name: "
        "/etc/shadow, another customer's disk. So the backing files of a chain must lie in the "
        "directory of the top image, either as given or with symbolic links resolved, and not in a "
        "directory below it. Two places are checked: the one that the name says, and the one that "
        "it leads to through symbolic links. For block device nodes the second is the last "
        "symbolic link under /dev, so /dev/VG/LV is checked as /dev/VG. --allow-backing PATH "
        "(repeatable) allows one more file, or a directory and everything below it. An image that "
        "is named on the command line is allowed as well."
    )
    image: str
    name: str
    how: str
    directories: str
    suggestion: str


class BackingCycle(ChainUnusable, Refused):
    """An image that is, over some steps, its own backing file."""

    code: ClassVar[str] = "backing-cycle"
    template: ClassVar[str] = (
        "{image} names the backing file {name!r}, which is {seen}, an image above it: the chain "
        "is a cycle"
    )
    hint: ClassVar[str] = (
        "find out which image is the right backing file, and store its path: `chainmerge relink "
        "{image} --backing FILE`"
    )
    explanation: ClassVar[str] = (
        "Following the backing files never ends, because one of them leads back to an image of the "
        "chain (perhaps under another name: a hard link, a symbolic link). No program can open "
        "such a chain. Usually somebody set a backing name to the wrong file by hand."
    )
    image: str
    name: str
    seen: str


class ChainTooLong(ChainUnusable, Refused):
    """More images than we follow."""

    code: ClassVar[str] = "chain-too-long"
    template: ClassVar[str] = "{top}: the chain has more than {limit} images"
    hint: ClassVar[str] = "merge from an image further down first"
    explanation: ClassVar[str] = (
        "Chains are followed up to a limit far beyond what QEMU itself can open, so that a forged "
        "chain cannot exhaust memory."
    )
    top: str
    limit: int


class FormatMissing(ChainUnusable, Refused):
    """A backing file without a declared format, whose content does not say what it is."""

    code: ClassVar[str] = "backing-format-missing"
    template: ClassVar[str] = (
        "{image} does not declare the format of its backing file {backing}, which is not a qcow2 "
        "image"
    )
    hint: ClassVar[str] = (
        "if it is raw, say so for this command with --format {backing}=raw, or for good: "
        "`chainmerge relink {image} --backing {backing} --format {backing}=raw`"
    )
    explanation: ClassVar[str] = (
        "When the format of a backing file is not declared, QEMU looks at its first bytes. The "
        "content of a raw disk belongs to the guest, which can write the header of any other "
        "format there and so have other files of the host opened as its disk. Therefore nothing is "
        "guessed: only a file that begins like a qcow2 image is taken for one, with a note; for "
        "any other file you must give the format."
    )
    image: str
    name: str
    backing: str


class TopFormatUnknown(ChainUnusable, Refused):
    """The image that the user named is not qcow2 and no format was given."""

    code: ClassVar[str] = "image-format-unknown"
    template: ClassVar[str] = "{image} is not a qcow2 image (it does not begin with QFI\\xfb)"
    hint: ClassVar[str] = "if it is a raw image, say so: --format {image}=raw"
    explanation: ClassVar[str] = (
        "An image given without a format must be qcow2. Any file could be a raw image, so raw is "
        "never assumed."
    )
    image: str


class WrongFormat(ChainUnusable, Refused):
    """Declared (or said to be) qcow2, but the file is something else."""

    code: ClassVar[str] = "wrong-format"
    template: ClassVar[str] = (
        "{image} should be a qcow2 image, says {declared_by}, but does not begin with QFI\\xfb"
    )
    hint: ClassVar[str] = (
        "check that it is the right file and that it is whole: never declare a qcow2 image that "
        "has lost its beginning as raw, restore it from a backup; if it was replaced by a raw "
        "image on purpose, declare that with `chainmerge relink CHILD --backing {image} --format "
        "{image}=raw`"
    )
    explanation: ClassVar[str] = (
        "The first four bytes of every qcow2 image are QFI\\xfb. A file without them was "
        "overwritten or truncated, or is not the image that was meant."
    )
    image: str
    declared_by: str


class FormatContradiction(ChainUnusable, Refused):
    """The user's format and the one stored in the chain differ."""

    code: ClassVar[str] = "format-contradiction"
    template: ClassVar[str] = (
        "{image} is declared as {declared!r} by {child}, but --format says {given!r}"
    )
    hint: ClassVar[str] = (
        "leave --format out: the virtual machine goes by the declaration; if the declaration is "
        "wrong: `chainmerge relink {child} --backing {image} --format {image}={given}`"
    )
    explanation: ClassVar[str] = (
        "The virtual machine reads its disk in the declared format. Merging in another one would "
        "mix the image's metadata into the guest's data, or the other way round."
    )
    image: str
    child: str
    declared: str
    given: str


class ForeignFormat(ChainUnusable, Refused):
    """An image of a format on which no chain may stand."""

    code: ClassVar[str] = "foreign-format"
    template: ClassVar[str] = (
        "{image} is declared as {format!r}: images of this format are not read"
    )
    hint: ClassVar[str] = (
        "copy it with `qemu-img convert -O qcow2` to a new file, and make that the backing file of "
        "its child: `chainmerge relink CHILD --backing NEW --format NEW=qcow2 --unchecked`; keep "
        "the old file until you have checked the disk"
    )
    explanation: ClassVar[str] = (
        "chainmerge reads the qcow2 and raw formats itself, to plan and to verify, and has QEMU "
        "read the vmdk, vdi, vhdx, vpc, qed and parallels formats, where the lowest image of a "
        "chain has one of them. Images of other formats can be shown as part of a chain, but their "
        "size and content are not known here."
    )
    image: str
    format: str


class ForeignUnreadable(ChainUnusable, Refused):
    """QEMU does not read the lowest image of a chain, or must not be asked to."""

    code: ClassVar[str] = "foreign-unreadable"
    template: ClassVar[str] = "the {format} image {image} cannot be read: {reason}"
    hint: ClassVar[str] = (
        "`qemu-img info {image}` shows what QEMU makes of it; if it keeps data in other files, and "
        "they may be used: --allow-backing with their directory; otherwise copy it with `qemu-img "
        "convert -O qcow2` to a new file, and make that the backing file of its child: "
        "`chainmerge relink CHILD --backing NEW --format NEW=qcow2 --unchecked`; keep the old file "
        "until you have checked the disk"
    )
    explanation: ClassVar[str] = (
        "Images of the vmdk, vdi, vhdx, vpc, qed and parallels formats are read by QEMU: qemu-img "
        "says how large the disk is, and qemu-nbd gives data where a merge needs it. A vmdk image "
        "can consist of several files, which it names itself: they must lie where backing files "
        "may lie, and chainmerge must understand every line that names them, as QEMU opens "
        "whatever is named. An image that has a backing file of its own is not the lowest one of "
        "its chain."
    )
    image: str
    format: str
    reason: str


class DataFileRefused(ChainUnusable, Refused):
    """An image keeps its guest data in another file, which nobody allowed."""

    code: ClassVar[str] = "data-file-refused"
    template: ClassVar[str] = "{image} keeps its guest data in an external data file, {name!r}"
    hint: ClassVar[str] = "if that is right, allow the file by its path: --allow-data-file PATH"
    explanation: ClassVar[str] = (
        "A qcow2 image can name an external data file, and an image from an untrusted source can "
        "name any file of the host there. So the user must name the files that are allowed. A "
        "relative name is resolved against the directory of the image and, as QEMU does, against "
        "the current directory; it must lead to one of the allowed files."
    )
    image: str
    name: str


class NotInChain(Misuse):
    """An image was named as part of a chain that it does not belong to."""

    code: ClassVar[str] = "not-in-chain"
    template: ClassVar[str] = "{image} is not in the backing chain of {top}"
    hint: ClassVar[str] = "`chainmerge info {top}` shows the chain"
    explanation: ClassVar[str] = (
        "Files are compared by device and inode, so symbolic and hard links to an image of the "
        "chain are recognised. This file is not one of them."
    )
    image: str
    top: str


class NoBackingFile(Misuse):
    """The image is the root of its chain."""

    code: ClassVar[str] = "no-backing-file"
    template: ClassVar[str] = "{image} has no backing file: there is nothing to merge it into"
    hint: ClassVar[str] = "name the overlay, which is the image above"
    explanation: ClassVar[str] = (
        "Merging moves the data of an overlay into an image below it. This image is the bottom of "
        "its chain."
    )
    image: str


class ActiveElsewhere(Misuse):
    """The image named as the active layer is not above top."""

    code: ClassVar[str] = "active-elsewhere"
    template: ClassVar[str] = "the backing chain of {active} does not lead to {top}"
    hint: ClassVar[str] = (
        "name the image that the virtual machine writes to; `chainmerge info {active}` shows the "
        "chain of the one given"
    )
    explanation: ClassVar[str] = (
        "--active names the active layer, so that the images above the merged one are known. The "
        "image given belongs to another chain, or lies below."
    )
    active: str
    top: str


class TooManyFiles(Refused):
    """A directory is too large to look for other users of base."""

    code: ClassVar[str] = "too-many-files"
    template: ClassVar[str] = (
        "cannot search all places for other users of the images: there are more than {limit} files "
        "up to and in {directory}"
    )
    hint: ClassVar[str] = "keep the images in directories with few other files"
    explanation: ClassVar[str] = (
        "An image that other images use must not be changed under them. To find those, the headers "
        "of all qcow2 files in the directories of the chain are read, up to a limit. If the search "
        "stopped there, a user could be missed."
    )
    directory: str
    limit: int


class SearchPathUnusable(Refused):
    """A directory that was to be searched cannot be read."""

    code: ClassVar[str] = "search-path-unusable"
    template: ClassVar[str] = "cannot search {path} for other users of the images: {reason}"
    hint: ClassVar[str] = "check the path and its permissions"
    explanation: ClassVar[str] = (
        "An image that other images use must not be changed under them. If a directory cannot be "
        "listed, it may hold such images."
    )
    path: str
    reason: str


class ImageReplaced(ImageUnavailable, Refused):
    """The file under an image's name is not the one that was examined."""

    code: ClassVar[str] = "image-replaced"
    template: ClassVar[str] = "{image} was replaced by another file since the chain was examined"
    hint: ClassVar[str] = (
        "make sure that nothing else works on this chain, then run the command again"
    )
    explanation: ClassVar[str] = (
        "Between examining the chain and opening the image, its path began to lead to another file "
        "(another inode or device). What was planned for the old file cannot be done to the new "
        "one."
    )
    image: str


class BaseNotBelowTop(Misuse):
    """Base was named, but is not below top."""

    code: ClassVar[str] = "base-not-below-top"
    template: ClassVar[str] = "{base} is not below {top} in the backing chain"
    hint: ClassVar[str] = "give the overlay as TOP, and the image to merge into with --base"
    explanation: ClassVar[str] = (
        "A merge moves the data of an overlay (top) down into an image below it (base). The two "
        "were given the wrong way round, or are the same image."
    )
    base: str
    top: str


class ImageDirty(ImageInvalid, Refused):
    """Base was not closed properly by a writer that defers refcounts."""

    code: ClassVar[str] = "image-dirty"
    template: ClassVar[str] = "{image} was not closed properly: its dirty bit is set"
    hint: ClassVar[str] = (
        "`chainmerge repair {image}` shows what is wrong, and with --yes repairs it; then run this "
        "command again"
    )
    explanation: ClassVar[str] = (
        "The dirty bit (lazy refcounts) says that the refcounts on disk may be too low. Writing to "
        "the image on that basis would put new data over clusters that are in use."
    )
    image: str


class ImageCorrupt(ImageInvalid, Refused):
    """QEMU marked the image corrupt."""

    code: ClassVar[str] = "image-corrupt"
    template: ClassVar[str] = "{image} is marked corrupt"
    hint: ClassVar[str] = (
        "`chainmerge repair {image}` shows what is wrong and how much of it can be repaired; look "
        "at that before you go on"
    )
    explanation: ClassVar[str] = (
        "QEMU sets the corrupt bit when it finds metadata that contradicts itself, and from then "
        "on refuses to write to the image. Nothing may be merged into it before it is repaired."
    )
    image: str


class ImageDamaged(ImageInvalid, Refused):
    """The consistency check of an image that would be written to found corruption."""

    code: ClassVar[str] = "image-damaged"
    template: ClassVar[str] = "{image} is damaged (corruptions: {corruptions}); the first: {first}"
    hint: ClassVar[str] = (
        "`chainmerge repair {image}` shows what is wrong and how much of it can be repaired, and "
        "with --yes repairs that; then run this command again"
    )
    explanation: ClassVar[str] = (
        "The refcounts recomputed from the image's tables do not match those stored in it, or "
        "tables point where they must not. Writing to such an image can destroy data. "
        "`chainmerge check` lists what was found."
    )
    image: str
    corruptions: int
    first: str
