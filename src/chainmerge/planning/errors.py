# SPDX-License-Identifier: Apache-2.0
"""Why a merge is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from chainmerge.errors import (
    CheckpointsAtRisk,
    NeededByOthers,
    NewerDataAtRisk,
    Refused,
    SnapshotsAtRisk,
)


@dataclass(eq=False)
class BaseNewer(NewerDataAtRisk, Refused):
    """The overlays look like ones that were left behind: base is newer."""

    code: ClassVar[str] = "base-newer"
    template: ClassVar[str] = (
        "{base} was written after {top} ({base_time}, {top_time}) and already holds {held} of "
        "{looked_at} clusters looked at of what is above it: {top} looks like an overlay that was "
        "merged before and left behind"
    )
    hint: ClassVar[str] = (
        "find out from which of them the guest ran last. If from {base}, {top} is of no use any "
        "more: do not merge it. If from {top}, a commit into {base} was cut short (by a kill, or "
        "because it was given up), and --despite-newer-base does it again; if that is wrong, all "
        "that was written to {base} since is overwritten for good: copy {base} first"
    )
    explanation: ClassVar[str] = (
        "After a commit or a pivot by somebody else (`qemu-img commit -d`, `virsh blockcommit "
        "--pivot`) the overlay stays where it is, and the guest goes on in base. Merged again, it "
        "would put its old data over what the guest has written since. Two things show that: base "
        "has most of what the overlays define already, data and zeros, in whole clusters that are "
        "spread over all of it; and base was written after all of them. A commit that was killed "
        "or given up half-way looks the same, and then the overlay is the right one (`chainmerge "
        "repair` looks for the marks of a writer that died). Merges of chainmerge's that were "
        "interrupted are known from their records and are not refused. Nothing was changed."
    )
    base: str
    top: str
    held: int
    looked_at: int
    base_time: str
    top_time: str


@dataclass(eq=False)
class BaseHasOtherChildren(NeededByOthers, Refused):
    """Another image builds on base."""

    code: ClassVar[str] = "base-has-other-children"
    template: ClassVar[str] = "{base} is also the backing file of {others}"
    hint: ClassVar[str] = (
        "pull instead (--direction pull), which leaves {base} as it is; or merge or delete "
        "{others} first"
    )
    explanation: ClassVar[str] = (
        "Merging changes what base contains. An image outside the merged range that has base as "
        "its backing file would see different data under it: its guest's disk would be "
        "destroyed."
    )
    base: str
    others: str


@dataclass(eq=False)
class CheckpointOfOthers(NeededByOthers, Refused):
    """What base gets or loses would change a checkpoint of an image outside the chain."""

    code: ClassVar[str] = "checkpoint-of-others"
    template: ClassVar[str] = (
        "the merge of {top} would change which images below {others} have the bitmap {name!r}: "
        "{base} has other children than {top}"
    )
    hint: ClassVar[str] = (
        "pull instead (--direction pull), which leaves {base} as it is; or, if that checkpoint of "
        "{others} is not needed, remove the bitmap from there (chainmerge bitmaps remove)"
    )
    explanation: ClassVar[str] = (
        "Base holds all that top shows already, so another image on base sees the same as before. "
        "But the merge would take a bitmap out of base, or put one there, of a name that the other "
        "image has, and could make a checkpoint worthless that is good for it. An image that stood "
        "on top before, and was put on base by hand, looks the same; its checkpoint is then a "
        "broken one, and has to be removed."
    )
    base: str
    name: str
    top: str
    others: str


@dataclass(eq=False)
class RelativeUnknown(NeededByOthers, Refused):
    """A file beside the images could be another user of them, and cannot be looked at."""

    code: ClassVar[str] = "relative-unknown"
    template: ClassVar[str] = (
        "{image} could stand on {base} or {top}, or on an image between them, and cannot be looked "
        "at: {reason}"
    )
    hint: ClassVar[str] = (
        "see to it that {image} can be read (as root, where only permissions are missing); as long "
        "as it cannot, only a pull without --delete (--direction pull) leaves what it could stand "
        "on as it is"
    )
    explanation: ClassVar[str] = (
        "Images do not know who builds on them, so the headers of all files in their directories "
        "are read. An overlay that is missed would be left with a backing file that is deleted, or "
        "that has other data: its guest's disk would be destroyed. One file could not be opened or "
        "read, so it cannot be told. Files that are damaged as images do not count: QEMU does not "
        "open them either."
    )
    image: str
    base: str
    top: str
    reason: str


@dataclass(eq=False)
class MiddleHasOtherChildren(NeededByOthers, Refused):
    """An image outside the chain builds on one between base and top."""

    code: ClassVar[str] = "middle-has-other-children"
    template: ClassVar[str] = (
        "an image between {base} and {top} is also the backing file of {others}"
    )
    hint: ClassVar[str] = "merge or delete {others} first, or choose a base above the branch"
    explanation: ClassVar[str] = (
        "After a merge of a range, the images between base and top have different data below "
        "them and are no longer usable. An image of another branch that builds on one of them "
        "would be destroyed."
    )
    base: str
    top: str
    others: str


@dataclass(eq=False)
class BaseCannotHoldBitmaps(CheckpointsAtRisk, Refused):
    """Valid checkpoints would be lost, because base cannot store bitmaps."""

    code: ClassVar[str] = "base-cannot-hold-bitmaps"
    template: ClassVar[str] = "{base} is {format} and cannot hold the bitmaps {names}"
    hint: ClassVar[str] = (
        "pull instead (--direction pull), which keeps them in top; or, for a version 2 image, "
        "`qemu-img amend -o compat=1.1 {base}` first; or give up the checkpoints with "
        "--drop-bitmaps: the next backup must then be a full one"
    )
    explanation: ClassVar[str] = (
        "Persistent dirty bitmaps exist in qcow2 version 3 only. The overlay holds valid ones; "
        "merged into a raw or version 2 image they are lost, and with them the checkpoints that "
        "incremental backups need."
    )
    base: str
    format: str
    names: str


@dataclass(eq=False)
class UnguardedBitmaps(CheckpointsAtRisk, Refused):
    """Dropping bitmaps would make images above pass for what they are not."""

    code: ClassVar[str] = "bitmaps-unguarded"
    template: ClassVar[str] = (
        "{base} cannot hold a tombstone for {names}, which {holders} would pass for valid"
    )
    hint: ClassVar[str] = (
        "pull instead (--direction pull); or remove those names from the images above first, the "
        "active image first (`chainmerge bitmaps remove IMAGE NAME`): the next backup that builds "
        "on them must then be a full one"
    )
    explanation: ClassVar[str] = (
        "An image above holds a bitmap of this name that covers only a part of what was written. "
        "Usually a tombstone in base (a disabled, empty bitmap) keeps it from being taken for a "
        "whole checkpoint; a raw or version 2 base cannot store one."
    )
    base: str
    names: str
    holders: str


@dataclass(eq=False)
class ChildSeesMore(NeededByOthers, Refused):
    """A child would see data of base that top's smaller size hides from it."""

    code: ClassVar[str] = "child-sees-more"
    template: ClassVar[str] = (
        "{child} (disk of {child_size} bytes) would see data of {base} ({base_size} bytes) that "
        "ends at {top_size} bytes today, where {top} ends"
    )
    hint: ClassVar[str] = (
        "pull instead (--direction pull), which leaves {base} as it is, and {child} as it sees "
        "{top}"
    )
    explanation: ClassVar[str] = (
        "An overlay shorter than its backing file hides the rest: what lies on it reads zeros "
        "there. Base does not shrink when it is merged into, so an image above that is larger than "
        "top would find base's old data where it had zeros."
    )
    base: str
    top: str
    child: str
    base_size: int
    top_size: int
    child_size: int


@dataclass(eq=False)
class EncryptedImage(Refused):
    """An image of the chain is encrypted, and its content cannot be read."""

    code: ClassVar[str] = "image-encrypted"
    template: ClassVar[str] = "{image} is encrypted, {problem}"
    hint: ClassVar[str] = (
        "name a file that holds the passphrase: --key-file {image}=FILE, or --key-file FILE for "
        "all images; `chainmerge bitmaps` works on encrypted images without one"
    )
    explanation: ClassVar[str] = (
        "Guest data of an encrypted image can be read, and so moved and verified, only with its "
        "key. It is QEMU that does so: chainmerge passes the names of the files on and never "
        "reads them. Images with LUKS encryption can be merged like that, those of QEMU's old AES "
        "scheme cannot: convert them by `qemu-img convert`."
    )
    image: str
    problem: str


@dataclass(eq=False)
class KeyFileUnusable(Refused):
    """The file with an image's passphrase cannot be read."""

    code: ClassVar[str] = "key-file-unusable"
    template: ClassVar[str] = "{key_file} cannot be read, which has the passphrase of {image}"
    hint: ClassVar[str] = "look at what was given with --key-file, and at the file's permissions"
    explanation: ClassVar[str] = (
        "QEMU reads the passphrases of encrypted images from files. One of these is not there, or "
        "may not be read. Nothing was changed."
    )
    key_file: str
    image: str


@dataclass(eq=False)
class CannotDeleteVolume(Refused):
    """--delete or --keep-name was asked for on a block device."""

    code: ClassVar[str] = "volume-not-a-file"
    template: ClassVar[str] = "{image} is a block device: {option} works on files only"
    hint: ClassVar[str] = (
        "merge without {option}; once that is done and verified, remove or rename the volume with "
        "your volume manager"
    )
    explanation: ClassVar[str] = (
        "A block volume is not deleted or renamed by removing its device node; its volume manager "
        "does that, and other hosts may have it active."
    )
    image: str
    option: str


@dataclass(eq=False)
class CannotRename(Refused):
    """--keep-name would have to move base to another file system."""

    code: ClassVar[str] = "rename-across-file-systems"
    template: ClassVar[str] = "{base} cannot get the name {top}: they are on different file systems"
    hint: ClassVar[str] = "merge without --keep-name"
    explanation: ClassVar[str] = (
        "A file takes another's name atomically only within one file system. Copying base to the "
        "other one would need its space there and a second verification."
    )
    base: str
    top: str


@dataclass(eq=False)
class BaseNamedByOthers(NeededByOthers, Refused):
    """--keep-name would take away the name that other images have for base."""

    code: ClassVar[str] = "base-named-by-others"
    template: ClassVar[str] = (
        "{base} cannot get the name {top}: {others} would not find their backing file any more"
    )
    hint: ClassVar[str] = "merge without --keep-name, so that {base} stays where it is"
    explanation: ClassVar[str] = (
        "With --keep-name the merged image gets top's name, and the name that base had leads "
        "nowhere. Other images hold that name as their backing file's, and could not be read any "
        "more. Nothing was changed."
    )
    base: str
    top: str
    others: str


@dataclass(eq=False)
class CannotTakeAway(Refused):
    """A file was to be deleted, replaced or renamed, and cannot be."""

    code: ClassVar[str] = "cannot-take-away"
    template: ClassVar[str] = "{path} cannot be deleted, replaced or renamed: {reason}"
    hint: ClassVar[str] = (
        "find out why it is so, since somebody may have meant it; or merge without {option}, "
        "which leaves all files where they are"
    )
    explanation: ClassVar[str] = (
        "The end of the merge that was asked for is to delete or rename files. The directory may "
        "not be written to, or the file is protected (immutable, append-only, in a sticky "
        "directory). This is looked at before anything is written. Nothing was changed."
    )
    path: str
    option: str
    reason: str


@dataclass(eq=False)
class DataFileOutOfReach(Refused):
    """--keep-name would take base away from its external data file."""

    code: ClassVar[str] = "data-file-out-of-reach"
    template: ClassVar[str] = (
        "{base} names its external data file {name!r}, which means another file in {directory}"
    )
    hint: ClassVar[str] = "merge without --keep-name"
    explanation: ClassVar[str] = (
        "A relative name in an image counts from the image's directory. With base moved to the "
        "directory of top, the name of its external data file would lead nowhere, or to another "
        "file. Nothing was changed."
    )
    base: str
    name: str
    directory: str


@dataclass(eq=False)
class SnapshotsWouldGo(SnapshotsAtRisk, Refused):
    """An image that is deleted or replaced holds internal snapshots."""

    code: ClassVar[str] = "internal-snapshots"
    template: ClassVar[str] = (
        "{option} would delete {image}, and with it the internal snapshots {names}"
    )
    hint: ClassVar[str] = (
        "copy out what you need of each (`qemu-img convert -O qcow2 -l SNAPSHOT {image} "
        "COPY`, the disk without a VM's state), then let them go with --drop-snapshots"
    )
    explanation: ClassVar[str] = (
        "Internal snapshots (`savevm`, `qemu-img snapshot`) live inside one image. A merge moves "
        "the current state only; with the image its snapshots are gone. Nothing was changed."
    )
    image: str
    names: str
    option: str
    instead: str
    """Another way that changes none, as far as there is one."""

    @property
    def own_advice(self) -> str:
        """What to do about it."""
        return self.instead + super().own_advice


@dataclass(eq=False)
class SnapshotsWouldChange(SnapshotsAtRisk, Refused):
    """Internal snapshots read from below what the merge changes there."""

    code: ClassVar[str] = "snapshots-would-change"
    template: ClassVar[str] = (
        "the merge would change what the internal snapshots {names} of {image} show"
    )
    hint: ClassVar[str] = (
        "copy out what you need of each (`qemu-img convert -O qcow2 -l SNAPSHOT {image} "
        "COPY`, the disk without a VM's state), then let them go with --drop-snapshots"
    )
    explanation: ClassVar[str] = (
        "An internal snapshot (`savevm`, `qemu-img snapshot`) of an overlay holds only what the "
        "overlay held when it was taken, and reads the rest from the image below. A commit puts "
        "newer data there, and a pull puts the overlay on another image: reverted to, the snapshot "
        "would show a disk that never was. Snapshots that read nothing of what changes are left "
        "as they are, and so are those of the image that is committed into. Nothing was changed."
    )
    image: str
    names: str
    instead: str
    """Another way that changes none, as far as there is one."""

    @property
    def own_advice(self) -> str:
        """What to do about it."""
        return self.instead + super().own_advice


@dataclass(eq=False)
class SnapshotsOfVmWouldChange(SnapshotsAtRisk, Refused):
    """The same in a running VM, where nobody else may remove them."""

    code: ClassVar[str] = "snapshots-would-change-live"
    template: ClassVar[str] = (
        "the merge would change what the internal snapshots {names} of {image} show, or delete them"
    )
    hint: ClassVar[str] = (
        "shut the VM down, copy out what you need of each (`qemu-img convert -O qcow2 -l SNAPSHOT "
        "{image} COPY`, the disk without the VM's state), and merge with --drop-snapshots"
    )
    explanation: ClassVar[str] = (
        "An internal snapshot of an overlay holds only what the overlay held when it was taken, "
        "and reads the rest from the image below, where the merge puts newer data. What the guest "
        "writes in the meantime goes there, too, so a snapshot is left as it is only if it reads "
        "nothing from below. A running VM has its images open, and only it may remove snapshots "
        "from them. Nothing was changed."
    )
    image: str
    names: str


@dataclass(eq=False)
class NativeUnavailable(Refused):
    """The native engine was asked for and cannot do this chain."""

    code: ClassVar[str] = "native-engine-unavailable"
    template: ClassVar[str] = "the native engine cannot merge into {base}: {reason}"
    hint: ClassVar[str] = "leave the choice to chainmerge (--engine auto), or use --engine qemu"
    explanation: ClassVar[str] = (
        "The native engine writes qcow2 images whose data is in their own file, and raw images. "
        "For everything else QEMU does the writing. Nothing was changed."
    )
    base: str
    reason: str


@dataclass(eq=False)
class PlacementUnavailable(Refused):
    """Data was asked to be placed in a way that the engine cannot do in this base."""

    code: ClassVar[str] = "placement-unavailable"
    template: ClassVar[str] = "{base}: data cannot be placed as asked for ({placement}): {reason}"
    hint: ClassVar[str] = "leave the choice to chainmerge (--data auto)"
    explanation: ClassVar[str] = (
        "Data that base has a cluster for already can go to a new cluster (cow) or over the old "
        "content (in-place). QEMU always writes in place, and so does everybody in a raw image, "
        "which has no clusters. Nothing was changed."
    )
    base: str
    placement: str
    reason: str


@dataclass(eq=False)
class PullUnavailable(Refused):
    """A pull was asked for and cannot be done."""

    code: ClassVar[str] = "pull-unavailable"
    template: ClassVar[str] = "cannot pull {base} up into {top}: {reason}"
    hint: ClassVar[str] = "commit instead (--direction commit)"
    explanation: ClassVar[str] = (
        "A pull moves what top lacks up from base and the images between into top, which then "
        "stands on base's backing file. The native engine does that, in qcow2 images whose data "
        "is in their own file. Nothing was changed."
    )
    base: str
    top: str
    reason: str


@dataclass(eq=False)
class DoomedInUse(NeededByOthers, Refused):
    """Images that were to be deleted after a pull are the backing files of others."""

    code: ClassVar[str] = "doomed-in-use"
    template: ClassVar[str] = "{doomed} cannot be deleted: it has other children: {others}"
    hint: ClassVar[str] = "leave out --delete: a pull does not need it"
    explanation: ClassVar[str] = (
        "A pull leaves base and the images between as they are, and whatever else stands on them "
        "goes on working. With them deleted it would not. Nothing was changed."
    )
    doomed: str
    others: str
