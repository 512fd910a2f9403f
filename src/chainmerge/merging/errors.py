# SPDX-License-Identifier: Apache-2.0
"""Why a merge stopped after it had begun, or was not begun for several disks."""

from __future__ import annotations

from typing import ClassVar

from chainmerge.errors import Failed, Misuse, NeededByOthers, NotVerified, Refused


class MergeUnfinished(Failed):
    """A merge that had begun could not continue."""

    # The job of a live merge is the VM's, which goes on with it.
    may_go_on: ClassVar[bool] = True
    code: ClassVar[str] = "merge-unfinished"
    template: ClassVar[str] = (
        "the merge of {top} began and could not go on: {reason}; the guest's data and its "
        "checkpoints are intact"
    )
    hint: ClassVar[str] = (
        "fix the cause that the message names, then run the same command again: it finds out how "
        "far this run got and finishes the job"
    )
    explanation: ClassVar[str] = (
        "Something that was there when the merge was planned was no longer there when it was "
        "needed: a file that could not be opened again, a limit on open files, storage that went "
        "away. Images may have changed by then, each in one atomic step. 'chainmerge status' shows "
        "how far the merge got."
    )
    top: str
    reason: str


class LeftoverInUse(NeededByOthers, Refused):
    """An image that only remains to be deleted is now the backing file of others."""

    code: ClassVar[str] = "leftover-in-use"
    template: ClassVar[str] = (
        "the merge into {base} is done, but {doomed} cannot be deleted: it is the backing file of "
        "{others}"
    )
    hint: ClassVar[str] = (
        "leave {doomed} where it is as long as it is needed; or give those images another backing "
        "file with the same content (`chainmerge relink OVERLAY --backing {base}`, which compares "
        "first), then run the same command again"
    )
    explanation: ClassVar[str] = (
        "All of the image's data is in base, and only its deletion was left to do. But somebody "
        "has since made an overlay on it, which could not be read without it. Nothing was changed."
    )
    base: str
    doomed: str
    others: str


class DisksMismatched(Misuse):
    """Tops and bases of several disks do not pair up."""

    code: ClassVar[str] = "disks-mismatched"
    template: ClassVar[str] = "the number of tops is {tops}, but the number of bases is {bases}"
    hint: ClassVar[str] = "give --base once for each TOP, in the same order, or not at all"
    explanation: ClassVar[str] = (
        "Several disks are merged as one operation: each top into an image below it, which is its "
        "backing file unless a base is named. Bases are named for all disks or for none."
    )
    tops: int
    bases: int


class DiskGone(Refused):
    """The overlay of one of several disks is missing, and no record says that it was merged."""

    code: ClassVar[str] = "disk-gone"
    template: ClassVar[str] = "{top}, one of {count} disks, is missing"
    hint: ClassVar[str] = (
        "find out what happened to it; the other disks can be merged without it: `{others}`"
    )
    explanation: ClassVar[str] = (
        "Several disks are merged as one operation, so that a snapshot is removed from all of "
        "them. The overlay of one disk does not exist, and no record says that it was merged and "
        "deleted. Perhaps somebody has deleted or moved it. Nothing was changed."
    )
    top: str
    count: int
    others: str


class DisksShareImage(Refused):
    """Two of several disks have an image in common that would be written to."""

    code: ClassVar[str] = "disks-share-image"
    template: ClassVar[str] = "{image} is part of the chains of {first} and of {second}"
    hint: ClassVar[str] = (
        "merge them one after the other; or into a base above the images that they have in common"
    )
    explanation: ClassVar[str] = (
        "Several disks are merged as one operation only if they are independent of each other: "
        "what is planned for one must still hold after another has been merged. Images that are "
        "only read, such as a common root, may be shared. Nothing was changed."
    )
    image: str
    first: str
    second: str


class VerificationFailed(NotVerified, Failed):
    """What was written is not what was planned."""

    code: ClassVar[str] = "verification-failed"
    template: ClassVar[str] = "{image} is not as planned after the merge: {difference}"
    hint: ClassVar[str] = (
        "the overlays were not changed and still give the right content: keep them, do not use "
        "{image} alone, check the storage below it, and run the same command again"
    )
    explanation: ClassVar[str] = (
        "After a merge the image is read back: its refcounts are recomputed, its bitmaps compared "
        "bit by bit with what was planned, its content with what the overlays show. One of these "
        "did not match. Nothing was deleted or given another backing file. The same command does "
        "all the work again; if it fails again, suspect the storage."
    )
    image: str
    difference: str
