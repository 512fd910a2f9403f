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
    "The guest goes on reading and writing its disk, and notices nothing. It still writes to the "
    "same image."
)


class VmUnreachable(VmUnavailable, Refused):
    """The VM does not answer."""

    code: ClassVar[str] = "vm-unreachable"
    template: ClassVar[str] = "{vm} does not answer: {reason}"
    hint: ClassVar[str] = (
        "check that the VM is running and that nobody else is connected to this monitor; "
        "`chainmerge merge` merges the images of a VM that is not running"
    )
    explanation: ClassVar[str] = (
        "A live merge is done by the VM's own QEMU, controlled through its monitor (QMP). A "
        "monitor serves one client at a time; others wait until that one disconnects. Nothing was "
        "changed."
    )
    vm: str
    reason: str


class VmRefused(Failed):
    """The VM answered a command with an error."""

    code: ClassVar[str] = "vm-refused"
    template: ClassVar[str] = "{vm} refused {command}: {reason}"
    hint: ClassVar[str] = (
        "fix the cause that QEMU reports, without changing images or bitmaps by hand, then run "
        "the same command again; `chainmerge live status` shows what is unfinished"
    )
    explanation: ClassVar[str] = (
        "QEMU was asked to do something and declined, with the reason shown. A refused command "
        "has changed nothing. " + _GUEST
    )
    vm: str
    command: str
    reason: str


class VmLost(VmUnavailable, OutcomeUnknown):
    """The VM, or the connection to it, went away in the middle of a merge."""

    code: ClassVar[str] = "vm-lost"
    template: ClassVar[str] = (
        "the connection to {vm} was lost while {top} and {base} were being merged: {reason}; "
        "whether its last step took effect is not known"
    )
    hint: ClassVar[str] = "if the VM runs: {resume}; if it does not: {cold}"
    explanation: ClassVar[str] = (
        "The connection to the VM broke, or it did not answer in time. The VM may still be running "
        "the merge, or may be dead; the images are intact in both cases. A journal beside base "
        "records the progress. One command continues in the VM, the other finishes the merge of "
        "the closed images."
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
        "consists of. Images are compared by device and inode, not by name."
    )
    vm: str
    image: str
    chain: str


class LiveChainDiffers(Refused):
    """The VM's chain is not the one that the images on disk tell of."""

    code: ClassVar[str] = "live-chain-differs"
    template: ClassVar[str] = "{vm} and the images on disk do not agree: {difference}"
    hint: ClassVar[str] = (
        "find out who changed the images or their headers while the VM was running, and do not "
        "stop the VM before that is clear: what it has open may be the right version; nothing was "
        "changed"
    )
    explanation: ClassVar[str] = (
        "Before a live merge the VM's block graph is compared with what the images' headers say: "
        "the same files in the same order, with the same bitmaps where nobody writes. If they "
        "differ, another program is changing this disk, or has changed it, and a plan made from "
        "the headers would not fit what the VM has open."
    )
    vm: str
    difference: str


class LiveImageExchanged(ImageUnavailable, Refused):
    """The VM has another file open than the one that stands at the path of its image."""

    code: ClassVar[str] = "live-image-exchanged"
    template: ClassVar[str] = (
        "{image} is not the file that {vm} has open: it was replaced or removed while the VM was "
        "running"
    )
    hint: ClassVar[str] = (
        "keep the VM running: if its file no longer has a name, it is lost when the VM ends, with "
        "everything that the guest has written to it; save the guest's disk first (a full backup, "
        "or a block copy to a new image), then find out who replaced it (`ls -l "
        "/proc/{process}/fd` shows what the VM has open)"
    )
    explanation: ClassVar[str] = (
        "A file that is replaced under its name (by a restore, a synchronising or deduplicating "
        "tool, an editor) continues to exist as long as a program has it open. The VM's QEMU would "
        "merge into files that vanish when it ends, and chainmerge would check, re-point and "
        "delete files that the VM has never opened: the images at these paths are not the guest's "
        "disk, even if they have the same content today. The kernel shows what the VM has open "
        "(/proc/PID/fd); it is compared by device and inode. No option overrides this. Nothing was "
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
        "do not repair or remove anything in the meantime; `chainmerge live resume` continues a "
        "job whose name begins with 'chainmerge-', `chainmerge live repair` shows which jobs have "
        "stopped at an error, and dismisses those that have ended"
    )
    explanation: ClassVar[str] = (
        "Backups, mirrors, other merges and the like use images of this chain, and a merge would "
        "change what they read. While a job writes to an image, the image's bitmaps are marked "
        "in-use on disk. That is not damage: they are stored when the job ends. Nothing was "
        "changed."
    )
    vm: str
    jobs: str


class LiveImageInUse(UsedByOthers, Refused):
    """Something else in the VM uses an image of the merged range."""

    code: ClassVar[str] = "live-image-in-use"
    template: ClassVar[str] = "in {vm}, {image} is also used by {users}"
    hint: ClassVar[str] = (
        "end that use (an export, another disk, another chain) with the tool that began it, then "
        "run the same command again"
    )
    explanation: ClassVar[str] = (
        "Base changes while data is copied into it, and the VM no longer has the merged images "
        "afterwards. Any other reader inside the same VM would read different data."
    )
    vm: str
    image: str
    users: str


class LiveOtherChildren(NeededByOthers, Refused):
    """Images that the VM does not have open stand on the merged range."""

    code: ClassVar[str] = "live-other-children"
    template: ClassVar[str] = "{others}: based on {top}, but not used by {vm}"
    hint: ClassVar[str] = (
        "find out what uses them: each can be the disk of another VM, or a restore point, and "
        "needs {top} as it is; once the VM is stopped, `chainmerge merge` makes base their backing "
        "file"
    )
    explanation: ClassVar[str] = (
        "A cold merge re-points all children of top. While a VM is running, only its own image can "
        "be re-pointed; the others would be left on a backing file that the guest no longer writes "
        "to."
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
        "A running QEMU cannot resize an image that has inconsistent bitmaps, merge bitmaps of "
        "disks of different sizes, keep a stored bitmap beside one of its name in memory, or "
        "handle names that are not valid UTF-8; and when it enlarges "
        "base to the size of top, the guest sees what base's storage holds beyond the old end. "
        "Before version 8.2 it cannot pull into an image with extended L2 entries; none pulls up "
        "what an image hides behind its end of a longer one below it; libvirt pulls "
        "into the active image alone. A merge of closed images has none of these limits. Do not "
        "enlarge base by other means."
    )
    vm: str
    image: str
    reason: str


class LiveNotWritable(Refused):
    """The VM cannot write to an image that the merge would change."""

    code: ClassVar[str] = "live-not-writable"
    template: ClassVar[str] = "{vm} cannot write to {image}: {reason}"
    hint: ClassVar[str] = (
        "find out why, and if it may be written to, give this VM access (permissions, "
        "the immutable flag, a read-only mount or device, AppArmor or SELinux); then run the same "
        "command again"
    )
    explanation: ClassVar[str] = (
        "Base takes the data, and the header of the image above top gets base's name. The VM "
        "normally has both open read-only. Through QMP it is asked to open them for writing and "
        "close them again, which changes nothing; if it cannot, it could not write to them in the "
        "merge either. For a libvirt domain, only what prevents everybody from writing is checked, "
        "because libvirt grants its VMs permissions when a merge begins. Nothing was changed."
    )
    vm: str
    image: str
    reason: str


class LiveBitmapBusy(UsedByOthers, Refused):
    """A backup uses a bitmap of the merged range."""

    code: ClassVar[str] = "live-bitmap-busy"
    template: ClassVar[str] = "in {vm}, bitmaps of {image} are in use: {names}"
    hint: ClassVar[str] = (
        "wait for the backup to end, or cancel it with the tool that began it; do not remove the "
        "bitmaps; `chainmerge live repair` shows what an interrupted backup has left"
    )
    explanation: ClassVar[str] = (
        "A bitmap that a backup job or an export uses cannot be changed until the job or the "
        "export ends."
    )
    vm: str
    image: str
    names: str


class UnfinishedMergeFound(Refused):
    """An earlier merge into base left something that this one must not go past."""

    code: ClassVar[str] = "live-other-unfinished"
    template: ClassVar[str] = "an interrupted merge into {base} has left {file}"
    hint: ClassVar[str] = (
        "finish that merge first, with the command that `chainmerge live status` prints, or "
        "`chainmerge status {base}` for one of closed images; keep the file: it is needed until "
        "that merge is finished"
    )
    explanation: ClassVar[str] = (
        "A merge of other images into the same base, or one of closed images, was interrupted. Its "
        "file holds what is needed to finish it, such as the only good copy of a bitmap, or which "
        "of two images is the right one."
    )
    base: str
    file: str


class LiveNotStarted(Refused):
    """The VM did not begin the merge at all."""

    code: ClassVar[str] = "live-not-started"
    template: ClassVar[str] = "{vm} refuses to start merging {top} and {base}: {reason}"
    hint: ClassVar[str] = (
        "fix the cause that the message names, then run the same command again; or stop "
        "the VM and use `chainmerge merge`"
    )
    explanation: ClassVar[str] = (
        "The VM refused the merge job, for the reason shown, before anything was written: the "
        "images, their bitmaps and the chain are unchanged. One reason that cannot be detected "
        "beforehand is a file that QEMU was told to open with `read-only=on` rather than "
        "`auto-read-only=on`."
    )
    vm: str
    base: str
    top: str
    reason: str


class LiveMergeFailed(Failed):
    """The merge did not come about, and what had been changed was put back."""

    code: ClassVar[str] = "live-merge-failed"
    template: ClassVar[str] = (
        "merging {top} and {base} in {vm} failed: {reason}; the VM reads {top} as before"
    )
    hint: ClassVar[str] = (
        "fix the cause that the message names, without changing images or bitmaps by hand, then "
        "run the same command again"
    )
    explanation: ClassVar[str] = (
        "The copy job in the VM failed, or somebody cancelled it. The chain is unchanged. Base "
        "may hold a part of the copy, which the images above hide; its bitmaps record again, and "
        "stale ones stay pruned. " + _GUEST
    )
    vm: str
    base: str
    top: str
    reason: str


class LiveMergeStalled(Failed):
    """The copy did not catch up with the guest, and the merge was undone as asked."""

    code: ClassVar[str] = "live-merge-stalled"
    template: ClassVar[str] = (
        "merging {top} and {base} did not catch up with what the guest writes: {remaining} bytes "
        "were left after {seconds:.0f} s; it was undone"
    )
    hint: ClassVar[str] = (
        "try again when the guest writes less, with more --bandwidth, or with --on-stall throttle"
    )
    explanation: ClassVar[str] = (
        "While the active image is merged, the guest goes on writing to it. If it writes faster "
        "than the copy, the merge never ends. --on-stall says what to do then: wait, slow the "
        "guest's disk down until the copy has caught up, or undo the merge, as was done here. "
        + _GUEST
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
        "nothing was deleted: keep the merged images until this is clear, and "
        "make a full backup from the running VM; look at {base} with `chainmerge check` and "
        "`chainmerge bitmaps list` once the VM is stopped"
    )
    explanation: ClassVar[str] = (
        "After a live merge the VM is asked for its chain and its bitmaps, and base is read back "
        "unless the VM writes to it. One of these is not as planned."
    )
    base: str
    difference: str


class NothingUnfinished(Refused):
    """There is no live merge to be carried on."""

    code: ClassVar[str] = "live-nothing-unfinished"
    template: ClassVar[str] = "no live merge of this disk of {vm} is unfinished"
    hint: ClassVar[str] = "`chainmerge live merge` starts one"
    explanation: ClassVar[str] = (
        "A live merge keeps a journal beside base until it is finished. There is none beside any "
        "image of this disk, so the last merge was finished or undone."
    )
    vm: str


class LiveMergeDriven(UsedByOthers, Refused):
    """Another process carries on a merge into the same base."""

    code: ClassVar[str] = "live-merge-driven"
    template: ClassVar[str] = "another chainmerge is merging into {base} right now"
    hint: ClassVar[str] = "wait until it ends; `chainmerge live status` shows its progress"
    explanation: ClassVar[str] = (
        "Two processes must not drive the same merge in a VM. The second one was refused and has "
        "changed nothing."
    )
    base: str


class LiveDisksMismatched(Misuse):
    """Disks of a VM and the images to merge on them do not pair up."""

    code: ClassVar[str] = "live-disks-mismatched"
    template: ClassVar[str] = "the number of disks is {disks}, but the number of tops is {tops}"
    hint: ClassVar[str] = (
        "name the disk of each TOP, in the same order (--device, --node or --disk), or give "
        "--all-disks, which finds the disks"
    )
    explanation: ClassVar[str] = (
        "Several disks of a running VM are merged as one operation: on each disk, one image into "
        "one below it. So there is one TOP for each disk that is named."
    )
    disks: int
    tops: int


class BaseWithoutTop(Misuse):
    """All disks are to be merged, and bases are named without the images to merge into them."""

    code: ClassVar[str] = "live-base-without-top"
    template: ClassVar[str] = "--base is given for all disks, and no TOP"
    hint: ClassVar[str] = "name a TOP of each disk, and --base once for each, in the same order"
    explanation: ClassVar[str] = (
        "With --all-disks and no TOP, the image that the guest writes to is merged into its "
        "backing file on each disk. Another base is one of a certain disk, so the image to merge "
        "into it is named as well."
    )


class NothingToMerge(Refused):
    """All disks are to be merged, and none has anything to merge."""

    code: ClassVar[str] = "live-nothing-to-merge"
    template: ClassVar[str] = "no disk of {vm} has anything to merge: {reasons}"
    hint: ClassVar[str] = (
        "nothing is to be done if no snapshot was expected; `chainmerge info IMAGE` shows the "
        "chain of an image"
    )
    explanation: ClassVar[str] = (
        "--all-disks merges on each disk of the VM that has a chain, that is an image with a "
        "backing file. Disks without a medium, disks that the guest only reads and images without "
        "a backing file are left out, and none is left."
    )
    vm: str
    reasons: str


class NoSuchLeftover(Misuse):
    """What was named to be removed from a VM is not there, or is not for removal."""

    code: ClassVar[str] = "live-no-such-leftover"
    template: ClassVar[str] = "{vm} has no {kind} {name!r} that could be removed"
    hint: ClassVar[str] = "`chainmerge live repair` without a name lists what there is"
    explanation: ClassVar[str] = (
        "`live repair` removes bitmaps that are in memory alone, and with --cancel-job jobs of "
        "others. It never removes a checkpoint (a bitmap that is persistent and consistent), a "
        "bitmap that a job or an export uses, or a merge of chainmerge's. Nothing was changed."
    )
    vm: str
    kind: str
    name: str


class LibvirtMissing(Misuse):
    """libvirt's Python package is not there."""

    code: ClassVar[str] = "libvirt-missing"
    template: ClassVar[str] = "libvirt's Python package cannot be used: {reason}"
    hint: ClassVar[str] = (
        "install python3-libvirt if the program is a package of the distribution, else: "
        "pip install 'chainmerge[libvirt]'"
    )
    explanation: ClassVar[str] = (
        "--domain reaches a VM through libvirt, with Python's package 'libvirt'. It is optional: "
        "merges of closed images and merges with --qmp do not need it."
    )
    reason: str


class NoSuchDomain(VmUnavailable, Misuse):
    """libvirt runs no such domain."""

    code: ClassVar[str] = "vm-no-such-domain"
    template: ClassVar[str] = "libvirt runs no domain {domain!r}; it runs: {known}"
    hint: ClassVar[str] = (
        "name one of those with --domain; `chainmerge merge` merges the images of a domain that is "
        "not running; --connect names another libvirt"
    )
    explanation: ClassVar[str] = (
        "A live merge needs a running domain. --connect takes the URI of another libvirt than "
        "qemu:///system."
    )
    domain: str
    known: str


class UnknownDomain(VmUnavailable, Misuse):
    """libvirt knows no such domain, running or not."""

    code: ClassVar[str] = "vm-unknown-domain"
    template: ClassVar[str] = "libvirt knows no domain {domain!r}; it knows: {known}"
    hint: ClassVar[str] = "name one of those with --domain; --connect names another libvirt"
    explanation: ClassVar[str] = (
        "The disks of a domain are found in its description, whether it runs or not. --connect "
        "takes the URI of another libvirt than qemu:///system."
    )
    domain: str
    known: str
