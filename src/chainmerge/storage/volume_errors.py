# SPDX-License-Identifier: Apache-2.0
"""Why a file, a device or a logical volume does not become larger or smaller."""

from __future__ import annotations

from typing import ClassVar

from chainmerge.errors import (
    Failed,
    ImageUnavailable,
    NoSpace,
    OutcomeUnknown,
    Refused,
    StorageFailed,
    UsedByOthers,
)


class DiscardFailed(StorageFailed, Failed):
    """The space could not be given back; the image is as it was."""

    code: ClassVar[str] = "discard-failed"
    template: ClassVar[str] = (
        "{image}: discarding {length} bytes at offset {offset} failed: {reason}"
    )
    hint: ClassVar[str] = (
        "nothing is wrong with the image; leave the discard out if the storage does not support it"
    )
    explanation: ClassVar[str] = (
        "The space of freed clusters was to be given back, but the device or the file system could "
        "not do it. Only space is lost; the image and the merge are not affected."
    )
    image: str
    offset: int
    length: int
    reason: str


class CannotShrink(Failed):
    """The volume keeps its size."""

    code: ClassVar[str] = "cannot-shrink"
    template: ClassVar[str] = "{image}: {kind} of {size} bytes cannot be made smaller: {reason}"
    hint: ClassVar[str] = "nothing is wrong with the image; leave the shrinking out"
    explanation: ClassVar[str] = (
        "Files and logical volumes can be made smaller; other block devices cannot. The image and "
        "the merge are not affected: the volume is only larger than it needs to be."
    )
    image: str
    kind: str
    size: int
    reason: str


class CannotGrow(NoSpace, Refused):
    """The image needs more room than its volume can give.

    ``limit`` is the largest possible size in bytes, as far as it is known.
    """

    image: str
    kind: str
    size: int
    required: int
    limit: int | None
    missing: int


class FileSystemFull(CannotGrow):
    """The file system cannot give the room."""

    code: ClassVar[str] = "file-system-full"
    template: ClassVar[str] = (
        "{image}: its file system lacks {missing} bytes for what will be written behind the file's "
        "end and into its holes (the file has {size} bytes and must have {required})"
    )
    hint: ClassVar[str] = (
        "free at least {missing} bytes more on the file system (or raise the quota), then run the "
        "same command again"
    )
    explanation: ClassVar[str] = (
        "The space that the operation needs at its peak is reserved before anything is written. "
        "The file system does not have that much. The image was not changed."
    )


class FileLimitReached(CannotGrow):
    """The file may not become as large as it would have to."""

    code: ClassVar[str] = "file-limit-reached"
    template: ClassVar[str] = (
        "{image}: the file of {size} bytes must be able to grow to {required} bytes, but may have "
        "only {limit}: {missing} bytes more are needed"
    )
    hint: ClassVar[str] = "allow the file to grow to at least {required} bytes"
    explanation: ClassVar[str] = (
        "A limit was set for the size of this file, and the operation needs more at its peak. "
        "The image was not changed."
    )


class DeviceTooSmall(CannotGrow):
    """A block device has the size that it has."""

    code: ClassVar[str] = "device-too-small"
    template: ClassVar[str] = (
        "{image}: the block device has {size} bytes, but {required} are needed: {missing} bytes "
        "more"
    )
    hint: ClassVar[str] = (
        "enlarge the device to at least {required} bytes, or copy the image to a larger one"
    )
    explanation: ClassVar[str] = (
        "chainmerge enlarges only files and logical volumes; any other block device must be large "
        "enough for what the operation needs at its peak. The image was not changed."
    )


class RawDeviceTooSmall(CannotGrow):
    """A block device is the guest's disk itself, and smaller than that of the image above."""

    code: ClassVar[str] = "raw-device-too-small"
    template: ClassVar[str] = (
        "{image}: this block device with a raw image has {size} bytes, but the disk above it has "
        "{required}: {missing} bytes more are needed"
    )
    hint: ClassVar[str] = (
        "pull instead (`chainmerge merge --direction pull TOP`, with the VM stopped), which leaves "
        "{image} as it is; do not enlarge the device: the guest would read what lies behind its "
        "present end where it has zeros now"
    )
    explanation: ClassVar[str] = (
        "A raw image has no size of its own: its device is the disk. Behind its end the guest "
        "reads zeros, but as soon as the device is larger the guest reads whatever the device "
        "holds there. chainmerge extends a logical volume, and first lets the overlay hide those "
        "bytes; for any other device there is no moment at which it could do so. Nothing was "
        "changed."
    )


class VolumeGroupFull(CannotGrow):
    """The logical volume cannot become as large as it would have to."""

    code: ClassVar[str] = "volume-group-full"
    template: ClassVar[str] = (
        "{image}: the logical volume of {size} bytes must grow to {required} bytes, but can have "
        "only {limit}: its volume group lacks {missing} bytes"
    )
    hint: ClassVar[str] = (
        "add a physical volume to the volume group ('vgextend'), or remove what nobody needs from "
        "it; {missing} bytes more must be free"
    )
    explanation: ClassVar[str] = (
        "The logical volume is extended to what the operation needs at its peak before anything is "
        "written, and its volume group does not have that much free space. On a volume with copies "
        "or parity (raid, mirror) each byte takes more than one. The image was not changed."
    )


class VolumeNotExtensible(CannotGrow):
    """LVM does not extend logical volumes of this type."""

    code: ClassVar[str] = "volume-not-extensible"
    template: ClassVar[str] = (
        "{image}: the logical volume of {size} bytes must have {required}: {missing} bytes more; "
        "it is of the type {type}, and chainmerge has LVM extend none of these"
    )
    hint: ClassVar[str] = (
        "if the image is qcow2, extend the volume by {missing} bytes by hand ('lvextend'), as far "
        "as LVM does that; or make it a type that LVM extends ('lvconvert')"
    )
    explanation: ClassVar[str] = (
        "Linear, striped, mirrored, raid, cached and thin volumes are extended to what the "
        "operation needs at its peak. Of other types (writecache, VDO, LVM snapshots, raid with "
        "integrity) LVM extends some in some versions, or not while they are in use. Never extend "
        "a volume with a raw image by hand: the guest would read what lies behind its present end "
        "(pull instead, with --direction pull). The image was not changed."
    )
    type: str


class ThinPoolFull(CannotGrow):
    """The pool of a thin volume may not have what the merge writes."""

    code: ClassVar[str] = "thin-pool-full"
    template: ClassVar[str] = (
        "{image}: the merge may take {takes} bytes of the thin pool {pool}, which has {free} bytes "
        "free, and {metadata_free} of metadata: {missing} bytes more are needed"
    )
    hint: ClassVar[str] = (
        "{remedy}; or discard what nobody needs from other volumes of the pool ('fstrim' in their "
        "guests); then run the same command again"
    )
    explanation: ClassVar[str] = (
        "A thin volume takes its space from a pool as it is written to. A pool that runs full "
        "fails the writes of all its volumes, those of running guests too. What the merge writes "
        "is counted in whole chunks, as an upper bound: which chunks the volume has already, and "
        "which of them an LVM snapshot shares so that writing takes new ones, LVM does not say. "
        "Each chunk also takes metadata of the pool. The image was not changed."
    )
    pool: str
    takes: int
    free: int
    metadata_free: int
    remedy: str


class ExtensionRefused(NoSpace, Refused):
    """LVM did not extend a logical volume, which has its old size."""

    code: ClassVar[str] = "lvm-extension-refused"
    template: ClassVar[str] = (
        "{image}: lvm did not extend the volume to {size} bytes (status {status}): {reason}"
    )
    hint: ClassVar[str] = (
        "fix the cause that lvm names (if somebody else has the volume group locked: wait until "
        "they are done), then run the same command again"
    )
    explanation: ClassVar[str] = (
        "The logical volume must be extended before anything is written, and LVM refused that, for "
        "example because somebody else has its volume group locked. The volume was checked: it "
        "still has its old size. Nothing was changed."
    )
    image: str
    size: int
    status: int
    reason: str


class VolumeNotActivated(ImageUnavailable, Refused):
    """LVM did not activate a logical volume."""

    code: ClassVar[str] = "volume-not-activated"
    template: ClassVar[str] = "{volume} cannot be activated: {reason}"
    hint: ClassVar[str] = "fix the cause that lvm names, then run the same command again"
    explanation: ClassVar[str] = (
        "With --activate, logical volumes of the chain that are not active are activated first. "
        "LVM refused that, for example because another host has the volume active. Nothing was "
        "changed, and what was activated for this command has been deactivated again."
    )
    volume: str
    reason: str


class VolumeNotRemoved(StorageFailed, Failed):
    """LVM did not remove a logical volume that nobody needs any more."""

    code: ClassVar[str] = "volume-not-removed"
    template: ClassVar[str] = (
        "{volume} was not removed: {reason}; the merge itself is done and verified"
    )
    hint: ClassVar[str] = (
        "find out who has it open (`lsof {volume}`, 'lvm lvs -o +devices'); then run the same "
        "command again, which removes what is left"
    )
    explanation: ClassVar[str] = (
        "The merge was to end with the removal of logical volumes. LVM removes none that is open, "
        "and chainmerge none that has LVM snapshots. The volume is there as it was; all of its "
        "data is in the merged image too."
    )
    volume: str
    reason: str


class VolumeNotRenamed(StorageFailed, Failed):
    """LVM did not give the merged image's volume the name of top's."""

    code: ClassVar[str] = "volume-not-renamed"
    template: ClassVar[str] = (
        "{volume} was not renamed to {name}: {reason}; it holds everything, verified"
    )
    hint: ClassVar[str] = (
        "fix the cause that lvm names, then run the same command again before the VM is started"
    )
    explanation: ClassVar[str] = (
        "The merge was to end with the merged image's logical volume taking the name of top's, "
        "which is removed by then. The data is complete and verified, under the volume's old name."
    )
    volume: str
    name: str
    reason: str


class VolumeShared(UsedByOthers, Refused):
    """Another host may use the logical volume, and nothing keeps it out."""

    code: ClassVar[str] = "volume-shared"
    template: ClassVar[str] = (
        "{image}: is on a volume of the volume group {group}, which {reason}; another host may be "
        "using the volume"
    )
    hint: ClassVar[str] = (
        "make sure that no virtual machine on another host uses the volume; {remedy}, then run the "
        "same command again"
    )
    explanation: ClassVar[str] = (
        "QEMU's image locks on a block device are known to the kernel of one host only: two hosts "
        "that use one volume do not notice each other, and a merge would destroy what the other "
        "one's guest writes. LVM tells that the volume group is shared between hosts (its lock "
        "type, vg_clustered, or the system ID of another host), and that this host does not hold "
        "the volume exclusively. It does once lvmlockd has given it the exclusive lock "
        "('lvchange -aey', which --activate does for volumes that are not active), or once your "
        "site's own lock command has succeeded (--lock-command). Nothing was changed."
    )
    image: str
    group: str
    reason: str
    remedy: str


class VolumeNotGranted(UsedByOthers, Refused):
    """The site's command does not lock the volumes for this host."""

    code: ClassVar[str] = "volume-not-granted"
    template: ClassVar[str] = "{volumes}: '{command} lock' refuses: {reason}"
    hint: ClassVar[str] = (
        "see which host has the lock: shut down there what uses the volumes, or run the command "
        "there; then run the same command again; do not break a lock of a host that may be alive"
    )
    explanation: ClassVar[str] = (
        "The command of --lock-command is run with the word 'lock' and the volumes that would be "
        "written to. It has not exited with status 0, which means that another host uses them, or "
        "it could not be run at all. Nothing was changed."
    )
    volumes: str
    command: str
    reason: str


class VolumeNotGivenBack(Failed):
    """The site's command does not give back a lock that it has taken."""

    code: ClassVar[str] = "volume-not-given-back"
    template: ClassVar[str] = (
        "{volumes}: '{command} unlock' does not give the lock back: {reason}; everything else is "
        "done"
    )
    hint: ClassVar[str] = "fix the cause, then release the lock with the tool that your site uses"
    explanation: ClassVar[str] = (
        "The command of --lock-command took the volumes for this host, and was run again with "
        "the word 'unlock' at the end. It has not exited with status 0, so other hosts may be "
        "kept out for longer than needed. The command itself has done its work."
    )
    volumes: str
    command: str
    reason: str


class LvmMissing(Refused):
    """The program that manages logical volumes cannot be run."""

    code: ClassVar[str] = "lvm-missing"
    template: ClassVar[str] = "{image}: is a logical volume, but 'lvm' cannot be run: {reason}"
    hint: ClassVar[str] = (
        "install the package lvm2, and make sure that the directory of 'lvm' is on PATH"
    )
    explanation: ClassVar[str] = (
        "Sizes of logical volumes are read and changed with the lvm command. It is not on PATH, "
        "or it may not be executed."
    )
    image: str
    reason: str


class NotALogicalVolume(Refused):
    """LVM does not know the volume."""

    code: ClassVar[str] = "not-a-logical-volume"
    template: ClassVar[str] = "{image}: is not a logical volume that lvm knows: {reason}"
    hint: ClassVar[str] = "look for the volume with 'lvm lvs -o +lv_path'"
    explanation: ClassVar[str] = (
        "The volume was to be treated as a logical volume, but the report of 'lvm lvs' does not "
        "list it, or lists another volume under its name."
    )
    image: str
    reason: str


class LvmFailed(StorageFailed, Failed):
    """The lvm command reported an error."""

    code: ClassVar[str] = "lvm-failed"
    template: ClassVar[str] = "{image}: '{command}' failed with status {status}: {reason}"
    hint: ClassVar[str] = "fix the cause that lvm names, then run the same command again"
    explanation: ClassVar[str] = (
        "LVM could not do what was requested; the message quotes it. LVM changes its metadata as a "
        "whole or not at all, so the volume has its old size. The image on it was not touched."
    )
    image: str
    command: str
    status: int
    reason: str


class LvmUnfinished(OutcomeUnknown):
    """The lvm command did not end."""

    code: ClassVar[str] = "lvm-unfinished"
    template: ClassVar[str] = (
        "{image}: '{command}' (pid {pid}) had not ended after {seconds} seconds; the volume may "
        "have its old or its new size"
    )
    hint: ClassVar[str] = (
        "see what process {pid} waits for (a lock held by another lvm command, a device that does "
        "not answer); once it has ended, run the same command again"
    )
    explanation: ClassVar[str] = (
        "A command that changes a logical volume was asked to stop and did not. It is left alone: "
        "killing it by force could leave the device suspended, which blocks everything that uses "
        "it. The image on the volume was not touched, and running the same command again later is "
        "safe."
    )
    image: str
    command: str
    pid: int
    seconds: float
