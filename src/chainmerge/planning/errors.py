# SPDX-License-Identifier: Apache-2.0
"""Why a merge is refused."""

from __future__ import annotations

from typing import ClassVar

from chainmerge.errors import (
    CheckpointsAtRisk,
    NeededByOthers,
    NewerDataAtRisk,
    Refused,
    SnapshotsAtRisk,
)


class BaseNewer(NewerDataAtRisk, Refused):
    """The overlays look as if they were left behind: base is newer."""

    code: ClassVar[str] = "base-newer"
    template: ClassVar[str] = (
        "{base} was written after {top} ({base_time}, {top_time}) and already holds most clusters "
        "sampled from the images above it ({held} of {looked_at}): {top} looks like an overlay "
        "that was merged before and left behind"
    )
    hint: ClassVar[str] = (
        "find out which of them the guest used last. If it was {base}, {top} is obsolete: do not "
        "merge it. If it was {top}, a commit into {base} was cut short (killed or cancelled), and "
        "--despite-newer-base does it again; if that is wrong, all that was written to {base} "
        "since is overwritten for good: copy {base} first"
    )
    explanation: ClassVar[str] = (
        "After a commit or a pivot by another program (`qemu-img commit -d`, `virsh blockcommit "
        "--pivot`) the overlay stays where it is, and the guest continues in base. Merged again, "
        "the overlay would put its old data over what the guest has written since. Two signs "
        "together suggest that: base already has most of what the overlays define, both data and "
        "zeros, in whole clusters sampled from all over the disk; and base was written after all "
        "of them. A commit that was killed or cancelled half-way looks the same, and then the "
        "overlay is the right one (`chainmerge repair` looks for the marks of a writer that died). "
        "Interrupted merges by chainmerge itself are known from their records and are not refused. "
        "Nothing was changed."
    )
    base: str
    top: str
    held: int
    looked_at: int
    base_time: str
    top_time: str


class BaseForeign(Refused):
    """Base is of a format in which nothing is written."""

    code: ClassVar[str] = "base-foreign"
    template: ClassVar[str] = (
        "{base} is a {format} image: chainmerge merges into qcow2 and raw images only"
    )
    hint: ClassVar[str] = (
        "pull its data up instead, which leaves it as it is: `chainmerge merge --direction pull "
        "--base {base} {top}`; the images above it can be merged with each other in any way"
    )
    explanation: ClassVar[str] = (
        "A vmdk, vdi, vhdx, vpc, qed or parallels image can be the lowest one of a chain. QEMU "
        "reads it where a merge of the images above it needs that, or where its data is pulled up. "
        "Nothing writes to it: no merge into such an image can be undone or completed after a kill."
    )
    base: str
    format: str
    top: str


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
        "its backing file would then read different data from it: its guest's disk would be "
        "destroyed."
    )
    base: str
    others: str


class CheckpointOfOthers(NeededByOthers, Refused):
    """What base gets or loses would change a checkpoint of an image outside the chain."""

    code: ClassVar[str] = "checkpoint-of-others"
    template: ClassVar[str] = (
        "the merge of {top} would change which images below {others} have the bitmap {name!r}: "
        "{base} also has children outside the chain of {top}"
    )
    hint: ClassVar[str] = (
        "pull instead (--direction pull), which leaves {base} as it is; or, if that checkpoint of "
        "{others} is not needed, remove the bitmap there (chainmerge bitmaps remove)"
    )
    explanation: ClassVar[str] = (
        "Base already holds all that top shows, so another image on base sees the same as before. "
        "But the merge would remove from base, or add to it, a bitmap whose name the other image "
        "has too, and could make a good checkpoint of that image worthless. An image that once had "
        "top as its backing file, and was put on base by hand, looks the same; then its checkpoint "
        "is a broken one, and must be removed."
    )
    base: str
    name: str
    top: str
    others: str


class RelativeUnknown(NeededByOthers, Refused):
    """A file beside the images could be another user of them, and cannot be examined."""

    code: ClassVar[str] = "relative-unknown"
    template: ClassVar[str] = (
        "{image} could have {base} or {top}, or an image between them, as its backing file, and "
        "cannot be examined: {reason}"
    )
    hint: ClassVar[str] = (
        "make {image} readable (if only permissions are missing: run the command as root); until "
        "then, only a pull without --delete (--direction pull) leaves everything that could be "
        "below it unchanged"
    )
    explanation: ClassVar[str] = (
        "Images do not know who builds on them, so the headers of all files in their directories "
        "are read. An overlay that is missed would be left with a backing file that is deleted or "
        "holds other data: its guest's disk would be destroyed. One file could not be opened or "
        "read, so nobody can tell whether it is such an overlay. Files that are damaged as images "
        "do not count: QEMU does not open them either."
    )
    image: str
    base: str
    top: str
    reason: str


class MiddleHasOtherChildren(NeededByOthers, Refused):
    """An image outside the chain builds on one between base and top."""

    code: ClassVar[str] = "middle-has-other-children"
    template: ClassVar[str] = (
        "an image between {base} and {top} is also the backing file of {others}"
    )
    hint: ClassVar[str] = "merge or delete {others} first, or choose a base above the branch"
    explanation: ClassVar[str] = (
        "After a merge of a range, the images between base and top have different data below them "
        "and are no longer usable. An image of another branch on top of one of them would be "
        "destroyed."
    )
    base: str
    top: str
    others: str


class BaseCannotHoldBitmaps(CheckpointsAtRisk, Refused):
    """Valid checkpoints would be lost, because base cannot store bitmaps."""

    code: ClassVar[str] = "base-cannot-hold-bitmaps"
    template: ClassVar[str] = (
        "{base} is {format} and cannot hold bitmaps; these would be lost: {names}"
    )
    hint: ClassVar[str] = (
        "pull instead (--direction pull), which keeps them in top; or, for a version 2 image, "
        "`qemu-img amend -o compat=1.1 {base}` first; or give the checkpoints up with "
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


class UnguardedBitmaps(CheckpointsAtRisk, Refused):
    """With bitmaps dropped, those in images above would pass for valid, which they are not."""

    code: ClassVar[str] = "bitmaps-unguarded"
    template: ClassVar[str] = (
        "{base} cannot hold a tombstone for {names}: without one, those in {holders} would pass "
        "for valid"
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


class ChildSeesMore(NeededByOthers, Refused):
    """A child would see data of base that top's smaller size hides from it."""

    code: ClassVar[str] = "child-sees-more"
    template: ClassVar[str] = (
        "{child} (disk of {child_size} bytes) would see data of {base} ({base_size} bytes) behind "
        "byte {top_size}, where {top} ends and hides it today"
    )
    hint: ClassVar[str] = (
        "pull instead (--direction pull), which leaves {base} as it is, and leaves what {child} "
        "sees as it is"
    )
    explanation: ClassVar[str] = (
        "An overlay shorter than its backing file hides the rest: images above it read zeros "
        "there. Base does not shrink when top is merged into it, so an image above that is larger "
        "than top would find base's old data where it had zeros."
    )
    base: str
    top: str
    child: str
    base_size: int
    top_size: int
    child_size: int


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
        "key. QEMU does that: chainmerge passes on the names of the key files and never reads "
        "them. Images with LUKS encryption can be merged like that. Those with QEMU's old AES "
        "scheme cannot: convert them with `qemu-img convert`."
    )
    image: str
    problem: str


class KeyFileUnusable(Refused):
    """The file with an image's passphrase cannot be read."""

    code: ClassVar[str] = "key-file-unusable"
    template: ClassVar[str] = "the key file {key_file} for {image} cannot be read"
    hint: ClassVar[str] = "check the name given with --key-file, and the file's permissions"
    explanation: ClassVar[str] = (
        "QEMU reads the passphrases of encrypted images from files. One of these is missing, or "
        "may not be read. Nothing was changed."
    )
    key_file: str
    image: str


class CannotDeleteVolume(Refused):
    """--delete or --keep-name was asked for on a block device."""

    code: ClassVar[str] = "volume-not-a-file"
    template: ClassVar[str] = (
        "{image} is a block device: {option} works on files and logical volumes only"
    )
    hint: ClassVar[str] = (
        "merge without {option}; once the merge is done and verified, remove or rename the volume "
        "with the tool that made it"
    )
    explanation: ClassVar[str] = (
        "Removing or renaming a device node does not delete or rename its volume. chainmerge has "
        "LVM do that for logical volumes; of other block devices it does not know how. Nothing was "
        "changed."
    )
    image: str
    option: str


class CannotRename(Refused):
    """--keep-name would have to move base to another file system."""

    code: ClassVar[str] = "rename-across-file-systems"
    template: ClassVar[str] = "{base} cannot get the name {top}: they are on different file systems"
    hint: ClassVar[str] = "merge without --keep-name"
    explanation: ClassVar[str] = (
        "A file can take over another file's name atomically only within one file system. Copying "
        "base to the other one would need space there and a second verification."
    )
    base: str
    top: str


class CannotRenameVolume(Refused):
    """--keep-name would have to move base to another volume group."""

    code: ClassVar[str] = "rename-across-groups"
    template: ClassVar[str] = (
        "{base} cannot get the name {top}: they are not logical volumes of one volume group"
    )
    hint: ClassVar[str] = "merge without --keep-name"
    explanation: ClassVar[str] = (
        "A logical volume can take over another one's name only within its volume group, and a "
        "file's never. Copying base would need the space once more, and a second verification. "
        "Nothing was changed."
    )
    base: str
    top: str


class BaseNamedByOthers(NeededByOthers, Refused):
    """--keep-name would take away the name that other images have for base."""

    code: ClassVar[str] = "base-named-by-others"
    template: ClassVar[str] = (
        "{base} cannot get the name {top}: it is the backing file of {others}, which could not "
        "find it any more"
    )
    hint: ClassVar[str] = "merge without --keep-name, so that {base} stays where it is"
    explanation: ClassVar[str] = (
        "With --keep-name the merged image gets top's name, and base's old name then leads "
        "nowhere. Other images name that file as their backing file, and could no longer be read. "
        "Nothing was changed."
    )
    base: str
    top: str
    others: str


class CannotTakeAway(Refused):
    """A file was to be deleted, replaced or renamed, and cannot be."""

    code: ClassVar[str] = "cannot-take-away"
    template: ClassVar[str] = "{path} cannot be deleted, replaced or renamed: {reason}"
    hint: ClassVar[str] = (
        "find out why, since somebody may have protected it on purpose; or merge without {option}, "
        "which leaves all files where they are"
    )
    explanation: ClassVar[str] = (
        "The merge as requested ends by deleting or renaming files or logical volumes. The "
        "directory may not be written to, the file is protected (immutable, append-only, in a "
        "sticky directory), or the volume has LVM snapshots, which would go with it. "
        "This is checked before anything is written. Nothing was changed."
    )
    path: str
    option: str
    reason: str


class DataFileOutOfReach(Refused):
    """--keep-name would take base away from its external data file."""

    code: ClassVar[str] = "data-file-out-of-reach"
    template: ClassVar[str] = (
        "{base} names its external data file {name!r}, which means another file in {directory}"
    )
    hint: ClassVar[str] = "merge without --keep-name"
    explanation: ClassVar[str] = (
        "A relative name in an image is resolved against the image's directory. With base moved to "
        "the directory of top, the name of its external data file would lead nowhere, or to "
        "another file. Nothing was changed."
    )
    base: str
    name: str
    directory: str


class SnapshotsWouldGo(SnapshotsAtRisk, Refused):
    """An image that is deleted or replaced holds internal snapshots."""

    code: ClassVar[str] = "internal-snapshots"
    template: ClassVar[str] = (
        "{option} would delete {image}, and its internal snapshots with it: {names}"
    )
    hint: ClassVar[str] = (
        "copy out what you need of each (`qemu-img convert -O qcow2 -l SNAPSHOT {image} COPY`, the "
        "disk without a VM's state), then delete them with --drop-snapshots"
    )
    explanation: ClassVar[str] = (
        "Internal snapshots (`savevm`, `qemu-img snapshot`) live inside one image. A merge moves "
        "only the current state; when the image is deleted, its snapshots are gone. Nothing was "
        "changed."
    )
    image: str
    names: str
    option: str
    instead: str
    """Another way that changes no snapshots, if there is one."""

    @property
    def own_advice(self) -> str:
        """What to do about it."""
        return self.instead + super().own_advice


class SnapshotsWouldChange(SnapshotsAtRisk, Refused):
    """Internal snapshots read from below what the merge changes there."""

    code: ClassVar[str] = "snapshots-would-change"
    template: ClassVar[str] = (
        "the merge would change what internal snapshots of {image} show: {names}"
    )
    hint: ClassVar[str] = (
        "copy out what you need of each (`qemu-img convert -O qcow2 -l SNAPSHOT {image} COPY`, the "
        "disk without a VM's state), then delete them with --drop-snapshots"
    )
    explanation: ClassVar[str] = (
        "An internal snapshot (`savevm`, `qemu-img snapshot`) of an overlay holds only what the "
        "overlay held when it was taken, and reads the rest from the image below. A commit puts "
        "newer data there, and a pull gives the overlay another backing file: after a revert, the "
        "guest would find a disk that never existed. Snapshots that read nothing of what changes "
        "are left as they are, and so are those of the image that is committed into. Nothing was "
        "changed."
    )
    image: str
    names: str
    instead: str
    """Another way that changes no snapshots, if there is one."""

    @property
    def own_advice(self) -> str:
        """What to do about it."""
        return self.instead + super().own_advice


class SnapshotsOfVmWouldChange(SnapshotsAtRisk, Refused):
    """The same in a running VM, where nobody else may remove them."""

    code: ClassVar[str] = "snapshots-would-change-live"
    template: ClassVar[str] = (
        "the merge would change what internal snapshots of {image} show, or delete them: {names}"
    )
    hint: ClassVar[str] = (
        "shut the VM down, copy out what you need of each (`qemu-img convert -O qcow2 -l SNAPSHOT "
        "{image} COPY`, the disk without the VM's state), and merge with --drop-snapshots"
    )
    explanation: ClassVar[str] = (
        "An internal snapshot of an overlay holds only what the overlay held when it was taken, "
        "and reads the rest from the image below, where the merge puts newer data. What the guest "
        "writes in the meantime goes there too, so a snapshot is left as it is only if it reads "
        "nothing from below. A running VM has its images open, and only the VM may remove "
        "snapshots from them. Nothing was changed."
    )
    image: str
    names: str


class NativeUnavailable(Refused):
    """The native engine was asked for and cannot do this chain."""

    code: ClassVar[str] = "native-engine-unavailable"
    template: ClassVar[str] = "the native engine cannot merge into {base}: {reason}"
    hint: ClassVar[str] = "leave the choice to chainmerge (--engine auto), or use --engine qemu"
    explanation: ClassVar[str] = (
        "The native engine writes raw images, and qcow2 images without an external data file. "
        "Everything else is written by QEMU. Nothing was changed."
    )
    base: str
    reason: str


class PlacementUnavailable(Refused):
    """Data was asked to be placed in a way that the engine cannot do in this base."""

    code: ClassVar[str] = "placement-unavailable"
    template: ClassVar[str] = "{base}: data cannot be placed as requested ({placement}): {reason}"
    hint: ClassVar[str] = "leave the choice to chainmerge (--data auto)"
    explanation: ClassVar[str] = (
        "Where base already has a cluster, the data can go to a new cluster (cow) or over the old "
        "content (in-place). QEMU always writes in place, and every engine does so in a raw image, "
        "which has no clusters. Nothing was changed."
    )
    base: str
    placement: str
    reason: str


class PullUnavailable(Refused):
    """A pull was asked for and cannot be done."""

    code: ClassVar[str] = "pull-unavailable"
    template: ClassVar[str] = "cannot pull {base} up into {top}: {reason}"
    hint: ClassVar[str] = "commit instead (--direction commit)"
    explanation: ClassVar[str] = (
        "A pull moves what top lacks up from base and the images between into top, which then gets "
        "base's backing file. Only the native engine does that, and only in qcow2 images without "
        "an external data file. Nothing was changed."
    )
    base: str
    top: str
    reason: str


class DoomedInUse(NeededByOthers, Refused):
    """Images that were to be deleted after a pull are the backing files of others."""

    code: ClassVar[str] = "doomed-in-use"
    template: ClassVar[str] = "{doomed} cannot be deleted: still needed by {others}"
    hint: ClassVar[str] = "leave --delete out: a pull does not need it"
    explanation: ClassVar[str] = (
        "A pull leaves base and the images between as they are, so other images on top of them "
        "keep working. If they were deleted, those images would be destroyed. Nothing was changed."
    )
    doomed: str
    others: str
