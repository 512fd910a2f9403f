# SPDX-License-Identifier: Apache-2.0
"""What can go wrong between us and a running VM.

::

    VmUnreachable       Refused         no connection, before anything was changed
    VmRefused           Failed          it answered a command with an error
    VmLost              OutcomeUnknown  it went away in the middle of a merge
    ...
"""

from __future__ import annotations

from typing import ClassVar

from chainmerge.errors import (
    Failed,
    ImageUnavailable,
    Misuse,
    NeededByOthers,
    NotVerified,
    OutcomeUnknown,
    Refused,
    UsedByOthers,
    VmUnavailable,
)

_GUEST = (
    "The guest reads and writes its disk all the time, and does not notice. "
    "The image that it writes to is the one that it was."
)


class VmUnreachable(VmUnavailable, Refused):
    """The VM does not answer."""

    code: ClassVar[str] = "vm-unreachable"
    template: ClassVar[str] = "{vm} does not answer: {reason}"
    hint: ClassVar[str] = (
        "see whether the VM runs and nobody else is connected to this monitor; the images of a "
        "VM that does not run are merged by `chainmerge merge`"
    )
    explanation: ClassVar[str] = (
        "A live merge is done by the VM's own QEMU, which is told so over its monitor (QMP). A "
        "monitor talks to one client at a time: others wait until that one has gone. Nothing "
        "was changed."
    )
    vm: str
    reason: str


class VmRefused(Failed):
    """The VM answered a command with an error."""

    code: ClassVar[str] = "vm-refused"
    template: ClassVar[str] = "{vm} refused {command}: {reason}"
    hint: ClassVar[str] = (
        "see to the reason that QEMU gives, without changing images or bitmaps by hand, then run "
        "the same command again; `chainmerge live status` tells what is unfinished"
    )
    explanation: ClassVar[str] = (
        "QEMU was asked to do something and declined, with the reason shown. A command that was "
        "refused has changed nothing by itself. " + _GUEST
    )
    vm: str
    command: str
    reason: str


class VmLost(VmUnavailable, OutcomeUnknown):
    """The VM, or the connection to it, went away in the middle of a merge."""

    code: ClassVar[str] = "vm-lost"
    template: ClassVar[str] = (
        "{vm} went away while {top} was being merged into {base}: {reason}; what it did last is "
        "not known"
    )
    hint: ClassVar[str] = "if the VM runs: {resume}; if it does not: {cold}"
    explanation: ClassVar[str] = (
        "The connection to the VM broke, or it did not answer in time. The VM may run and go on "
        "with the merge, or be dead: both leave images that are right. What was done so far is in "
        "a journal beside base; the command for the one case looks at the VM and goes on, the one "
        "for the other looks at the images."
    )
    vm: str
    base: str
    top: str
    reason: str
    resume: str
    cold: str


class NoSuchDisk(VmUnavailable, Misuse):
    """The VM has no such disk."""

    code: ClassVar[str] = "vm-no-such-disk"
    template: ClassVar[str] = "{vm} has no disk {wanted!r}; it has: {known}"
    hint: ClassVar[str] = (
        "name one of those: a device with --device, a node with --node, a domain's disk with --disk"
    )
    explanation: ClassVar[str] = (
        "--device takes the id of the guest's device (or, in older command lines, of its drive), "
        "--node the node name of its active image, as `query-block` and `query-named-block-nodes` "
        "show them."
    )
    vm: str
    wanted: str
    known: str


class NotInVm(VmUnavailable, Misuse):
    """The image is not one of the VM's disk."""

    code: ClassVar[str] = "live-not-in-vm"
    template: ClassVar[str] = "{image} is not an image of this disk of {vm}, which reads: {chain}"
    hint: ClassVar[str] = (
        "name one of those; an image that the VM does not have open is merged by `chainmerge merge`"
    )
    explanation: ClassVar[str] = (
        "A live merge is done inside the VM, so top and base must be images that the VM's disk "
        "consists of. Images are compared by what they are, not by their names."
    )
    vm: str
    image: str
    chain: str


class LiveChainDiffers(Refused):
    """The VM's chain is not the one that the images on disk tell of."""

    code: ClassVar[str] = "live-chain-differs"
    template: ClassVar[str] = "{vm} and the images on disk do not agree: {difference}"
    hint: ClassVar[str] = (
        "find out who changed the images, or their headers, while the VM ran, and do not stop the "
        "VM before that is clear: what it has open may be what is right; nothing was changed"
    )
    explanation: ClassVar[str] = (
        "Before a live merge the VM's block graph is compared with what the images' headers say: "
        "the same files in the same order, with the same bitmaps where nobody writes. Where they "
        "differ, somebody works on this disk, or has: a plan that rests on the one would be "
        "carried out on the other."
    )
    vm: str
    difference: str


class LiveImageExchanged(ImageUnavailable, Refused):
    """The VM has another file open than the one that stands at the path of its image."""

    code: ClassVar[str] = "live-image-exchanged"
    template: ClassVar[str] = (
        "what is at {image} now is not the file that {vm} has open: it was replaced, or removed, "
        "while the VM ran"
    )
    hint: ClassVar[str] = (
        "keep the VM running: if its file has no name any more, it is gone when the VM ends, with "
        "all that the guest has written to it; save the guest's disk first (a full backup, or a "
        "block copy to a new image), then find out who did that (`ls -l /proc/{process}/fd` "
        "shows what the VM has open)"
    )
    explanation: ClassVar[str] = (
        "A file that is replaced under its name (by a restore, a synchronising or deduplicating "
        "tool, an editor) goes on living as long as somebody has it open. The VM's QEMU would "
        "merge into files that are gone when it ends, and chainmerge would look at, re-point and "
        "delete others that the VM has never seen: the images at these paths are not the guest's "
        "disk, even where they hold the same today. What the VM has open is told by the kernel "
        "(/proc/PID/fd), and compared by device and inode. No option goes past this. Nothing was "
        "changed."
    )
    vm: str
    image: str
    process: str


class LiveJobRunning(UsedByOthers, Refused):
    """A block job works on the chain."""

    code: ClassVar[str] = "live-job-running"
    template: ClassVar[str] = "{vm} has jobs on this chain: {jobs}"
    hint: ClassVar[str] = (
        "let them end, or have whoever started them cancel them, then run the same command again; "
        "do not repair or remove anything meanwhile; a job of chainmerge's own, whose name begins "
        "with 'chainmerge-', is carried on by `chainmerge live resume`"
    )
    explanation: ClassVar[str] = (
        "Backups, mirrors, other merges and the like hold images of this chain. A merge beside "
        "them would change what they read. As long as a job writes to an image, the bitmaps of "
        "that image are marked in-use on disk. That is no damage: they are stored when it ends. "
        "Nothing was changed."
    )
    vm: str
    jobs: str


class LiveImageInUse(UsedByOthers, Refused):
    """Something else in the VM uses an image of the merged range."""

    code: ClassVar[str] = "live-image-in-use"
    template: ClassVar[str] = "in {vm}, {image} is also used by {users}"
    hint: ClassVar[str] = (
        "have that use ended by whoever began it (an export, another disk, another chain), then "
        "run the same command again"
    )
    explanation: ClassVar[str] = (
        "Base changes while data is copied into it, and the merged images are gone from the VM "
        "afterwards. Whoever else reads them inside the same VM would see that."
    )
    vm: str
    image: str
    users: str


class LiveOtherChildren(NeededByOthers, Refused):
    """Images that the VM does not have open stand on the merged range."""

    code: ClassVar[str] = "live-other-children"
    template: ClassVar[str] = "{others} stand on {top}, and are no images of {vm}"
    hint: ClassVar[str] = (
        "find out whose they are: each can be the disk of another VM, or a restore point, and "
        "needs {top} as it is; with the VM stopped, `chainmerge merge` puts them on base by itself"
    )
    explanation: ClassVar[str] = (
        "A cold merge re-points all children of top. In a running VM only its own image can be "
        "re-pointed, and the others would be left on images that the guest's writes go past."
    )
    vm: str
    top: str
    others: str


class LiveUnsuited(Refused):
    """The chain is one that is merged cold only."""

    code: ClassVar[str] = "live-unsuited"
    template: ClassVar[str] = "{image} cannot be merged while {vm} runs: {reason}"
    hint: ClassVar[str] = "stop the VM and use `chainmerge merge`"
    explanation: ClassVar[str] = (
        "A running QEMU cannot resize an image that holds broken bitmaps, unite bitmaps of disks "
        "of different sizes, or be told names that are no UTF-8; and when it makes base's disk as "
        "large as top's, the guest sees what base's storage holds behind the old end. All that is "
        "no obstacle to a merge of closed images. Do not enlarge base by other means."
    )
    vm: str
    image: str
    reason: str


class LiveNotWritable(Refused):
    """The VM cannot write to an image that the merge would change."""

    code: ClassVar[str] = "live-not-writable"
    template: ClassVar[str] = "{vm} cannot write to {image}: {reason}"
    hint: ClassVar[str] = (
        "find out why it was made so, and if it may be written to, let this VM do it (permissions, "
        "the immutable flag, a read-only mount or device, AppArmor or SELinux); then run the same "
        "command again"
    )
    explanation: ClassVar[str] = (
        "Base takes the data, and the header of the image above top gets base's name. Both are "
        "open for reading only while the VM runs. By QMP the VM is asked to open them for writing "
        "once more, and to close them again, which changes nothing; what it cannot open then it "
        "could not write to in the merge. Of a domain of libvirt only that is known which keeps "
        "everybody from writing, as libvirt gives its VMs their permissions when a merge begins. "
        "Nothing was changed."
    )
    vm: str
    image: str
    reason: str


class LiveBitmapBusy(UsedByOthers, Refused):
    """A backup uses a bitmap of the merged range."""

    code: ClassVar[str] = "live-bitmap-busy"
    template: ClassVar[str] = "in {vm}, bitmaps of {image} are in use: {names}"
    hint: ClassVar[str] = (
        "wait for the backup to end, or have it ended by whoever began it; do not remove the "
        "bitmaps"
    )
    explanation: ClassVar[str] = (
        "A bitmap that a backup job or an export uses cannot be changed until that is over."
    )
    vm: str
    image: str
    names: str


class UnfinishedMergeFound(Refused):
    """An earlier merge into base left something that this one must not go past."""

    code: ClassVar[str] = "live-other-unfinished"
    template: ClassVar[str] = "an interrupted merge into {base} has left {file}"
    hint: ClassVar[str] = (
        "finish that merge first, by the command that `chainmerge live status` prints, or "
        "`chainmerge status {base}` for one of closed images; keep the file: only the end of that "
        "merge makes it worthless"
    )
    explanation: ClassVar[str] = (
        "A merge of other images into the same base, or one of closed images, was interrupted. "
        "Its file holds what it needs to be finished, such as the only good copy of a bitmap, or "
        "which of two images is the right one."
    )
    base: str
    file: str


class LiveNotStarted(Refused):
    """The VM did not begin the merge at all."""

    code: ClassVar[str] = "live-not-started"
    template: ClassVar[str] = "{vm} does not begin to merge {top} into {base}: {reason}"
    hint: ClassVar[str] = (
        "see whether what is said there can be helped, then run the same command again; or stop "
        "the VM and use `chainmerge merge`"
    )
    explanation: ClassVar[str] = (
        "The VM declined the job that merges, with the reason shown. That comes before anything "
        "is written: the images, their bitmaps and the chain are what they were. A file that "
        "QEMU was told to open with `read-only=on`, rather than `auto-read-only=on`, is such a "
        "reason, which cannot be seen beforehand."
    )
    vm: str
    base: str
    top: str
    reason: str


class LiveMergeFailed(Failed):
    """The merge did not come about, and what had been changed was put back."""

    code: ClassVar[str] = "live-merge-failed"
    template: ClassVar[str] = (
        "merging {top} into {base} in {vm} failed: {reason}; the VM reads {top} as before"
    )
    hint: ClassVar[str] = (
        "see to the reason that is given, without changing images or bitmaps by hand, then run the "
        "same command again"
    )
    explanation: ClassVar[str] = (
        "The job that copies in the VM failed, or was cancelled by somebody. The chain is what it "
        "was. Base may hold a part of the copy, which the images above hide; its bitmaps record "
        "again, stale ones stay pruned. " + _GUEST
    )
    vm: str
    base: str
    top: str
    reason: str


class LiveMergeStalled(Failed):
    """The copy did not catch up with the guest, and the merge was undone as asked."""

    code: ClassVar[str] = "live-merge-stalled"
    template: ClassVar[str] = (
        "merging {top} into {base} did not catch up with what the guest writes: {remaining} bytes "
        "were left after {seconds:.0f} s; it was undone"
    )
    hint: ClassVar[str] = (
        "try again when the guest writes less, with more --bandwidth, or with --on-stall throttle"
    )
    explanation: ClassVar[str] = (
        "While the active image is merged the guest goes on writing to it. If that is faster than "
        "the copy, there is no end to it. --on-stall says what to do then: wait, slow the guest's "
        "disk down until the copy has caught up, or undo the merge, as was done here. " + _GUEST
    )
    base: str
    top: str
    remaining: int
    seconds: float


class LiveVerificationFailed(NotVerified, Failed):
    """What the VM has after the merge is not what was planned."""

    code: ClassVar[str] = "live-verification-failed"
    template: ClassVar[str] = "after the merge {base} is not as planned: {difference}"
    hint: ClassVar[str] = (
        "nothing was deleted, and must not be before this is clear: keep the merged images, and "
        "make a full backup from the running VM; look at {base} with `chainmerge check` and "
        "`chainmerge bitmaps list` once the VM is stopped"
    )
    explanation: ClassVar[str] = (
        "After a live merge the VM is asked what its chain and its bitmaps are, and where the VM "
        "does not write to base, base is read back. One of these did not agree."
    )
    base: str
    difference: str


class NothingUnfinished(Refused):
    """There is no live merge to be carried on."""

    code: ClassVar[str] = "live-nothing-unfinished"
    template: ClassVar[str] = "no live merge of this disk of {vm} is unfinished"
    hint: ClassVar[str] = "`chainmerge live merge` starts one"
    explanation: ClassVar[str] = (
        "A live merge keeps a journal beside base until it is settled. There is none beside any "
        "image of this disk, so the last merge came to its end, or was undone."
    )
    vm: str


class LiveMergeDriven(UsedByOthers, Refused):
    """Another process carries on a merge into the same base."""

    code: ClassVar[str] = "live-merge-driven"
    template: ClassVar[str] = "another chainmerge is merging into {base} right now"
    hint: ClassVar[str] = "let it come to its end; `chainmerge live status` shows how far it is"
    explanation: ClassVar[str] = (
        "Two processes that carry on the same merge would both tell the VM what to do next. The "
        "second one was refused and has changed nothing."
    )
    base: str


class LibvirtMissing(Misuse):
    """libvirt's Python package is not there."""

    code: ClassVar[str] = "libvirt-missing"
    template: ClassVar[str] = "libvirt's Python package cannot be used: {reason}"
    hint: ClassVar[str] = "pip install 'chainmerge[libvirt]'"
    explanation: ClassVar[str] = (
        "--domain reaches a VM through libvirt, by the package 'libvirt' of Python. It is an "
        "optional part of chainmerge, for merges of closed images and by --qmp do without it."
    )
    reason: str


class NoSuchDomain(VmUnavailable, Misuse):
    """libvirt runs no such domain."""

    code: ClassVar[str] = "vm-no-such-domain"
    template: ClassVar[str] = "libvirt runs no domain {domain!r}; it runs: {known}"
    hint: ClassVar[str] = (
        "name one of those with --domain; the images of a domain that does not run are merged "
        "by `chainmerge merge`; --connect names another libvirt"
    )
    explanation: ClassVar[str] = (
        "A live merge needs a domain that runs. With --connect a libvirt is named that is not "
        "qemu:///system, by its URI."
    )
    domain: str
    known: str
