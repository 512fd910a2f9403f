# SPDX-License-Identifier: Apache-2.0
"""Why an image was not repaired, or was not given another backing file."""

from __future__ import annotations

from typing import ClassVar

from chainmerge.errors import CheckpointsAtRisk, Failed, NewerDataAtRisk, NotVerified, Refused


class RepairNotVerified(NotVerified, Failed):
    """The image is not what the repair should have made of it."""

    code: ClassVar[str] = "repair-not-verified"
    template: ClassVar[str] = "{image} is not as it should be after the repair: {difference}"
    hint: ClassVar[str] = (
        "`chainmerge repair --undo BACKUP` puts back what was there, BACKUP being the newest file "
        "beside the image that has its name and ends in a number; check the storage below it"
    )
    explanation: ClassVar[str] = (
        "After a repair the image is read back: its refcounts are recomputed and its bitmaps "
        "compared with what was planned. Something did not match. What the repair has overwritten "
        "is in its backup. In the tables that say what the guest sees, only flags were changed."
    )
    image: str
    difference: str


class RelinkUncheckable(Refused):
    """What the image shows with its old backing file cannot be read."""

    code: ClassVar[str] = "relink-uncheckable"
    template: ClassVar[str] = "what {image} shows now cannot be read: {reason}"
    hint: ClassVar[str] = (
        "if the old backing file still exists, put it back for the comparison; add "
        "--unchecked only if you know that the new one has the same content"
    )
    explanation: ClassVar[str] = (
        "An overlay holds only what was written since the snapshot; everything else comes from its "
        "backing file. With other content below it the guest's disk is destroyed, and nothing in "
        "the images shows it. So both are compared, unless you say that they are the same. Nothing "
        "was changed."
    )
    image: str
    reason: str


class RelinkChangesContent(NewerDataAtRisk, Refused):
    """The image would show other data with the new backing file."""

    code: ClassVar[str] = "relink-changes-content"
    template: ClassVar[str] = (
        "{image} would not show the same data with {backing} as its backing file: guest byte "
        "{offset} of {what} differs"
    )
    hint: ClassVar[str] = (
        "look for the file that {image} was created on; `chainmerge relink {image}` lists files "
        "that could be the right one"
    )
    explanation: ClassVar[str] = (
        "What the image shows with its old backing file and with the new one was compared, and "
        "differs. The guest would find other data on its disk. Nothing was changed."
    )
    image: str
    backing: str
    offset: int
    what: str


class RelinkChangesCheckpoints(CheckpointsAtRisk, Refused):
    """A checkpoint would mean something else with the new backing file."""

    code: ClassVar[str] = "relink-changes-checkpoints"
    template: ClassVar[str] = (
        "with {backing} as the backing file of {image}, these bitmaps of the chain would not "
        "make the same checkpoints: {names}"
    )
    hint: ClassVar[str] = (
        "use a copy that has the bitmaps of the old backing file (cp, not qemu-img convert); or "
        "give those checkpoints up: remove the bitmaps from the images above and from {image} "
        "(chainmerge bitmaps remove), the active image first, then run this command again; the "
        "next backup must then be a full one"
    )
    explanation: ClassVar[str] = (
        "A backup takes the bits of a checkpoint from the active image and from the images below "
        "it that also have it. The new backing file has the same data, but not the same bitmaps: a "
        "checkpoint would lose bits, so that the next incremental backup would miss data, or it "
        "could not be used any more. Nothing was changed."
    )
    image: str
    backing: str
    names: str


class RelinkUnfinished(Refused):
    """A merge in which the image takes part was not finished."""

    code: ClassVar[str] = "relink-unfinished-merge"
    template: ClassVar[str] = "{image} takes part in an unfinished merge into {base} ({file})"
    hint: ClassVar[str] = "`chainmerge status {image}` says how to finish it; do that first"
    explanation: ClassVar[str] = (
        "To finish an interrupted merge, chainmerge looks at the backing files of its images. If "
        "one of them had another backing file, the result would be wrong. Nothing was changed."
    )
    image: str
    base: str
    file: str


class RelinkIncomplete(Failed):
    """The header does not hold what was written."""

    code: ClassVar[str] = "relink-incomplete"
    template: ClassVar[str] = "{image} names {found!r} as its backing file after the change"
    hint: ClassVar[str] = "check the storage below {image}, and run the same command again"
    explanation: ClassVar[str] = (
        "The image's header was written and read back, and does not hold what was written. The "
        "image's data is untouched."
    )
    image: str
    found: str


class NothingToCancel(Refused):
    """No unfinished merge of the image is known."""

    code: ClassVar[str] = "nothing-to-cancel"
    template: ClassVar[str] = "no unfinished merge has {image} as its top or base"
    hint: ClassVar[str] = "`chainmerge status DIRECTORY` lists what is unfinished below a directory"
    explanation: ClassVar[str] = (
        "A merge that was interrupted leaves small files beside its images, or in "
        "/var/lib/chainmerge if they are block devices. None of those that were found names this "
        "image as the one that is merged or the one that is merged into. Nothing was changed."
    )
    image: str


class CannotCancel(Refused):
    """The merge has taken effect, or half done so."""

    code: ClassVar[str] = "cannot-cancel"
    template: ClassVar[str] = "the merge of {top} into {base} cannot be undone: {reason}"
    hint: ClassVar[str] = "finish it instead: {command}"
    explanation: ClassVar[str] = (
        "A merge by the native engine takes effect with the write of one sector. Before that the "
        "image is what it was, and the merge can be undone. After that the merge is done, but for "
        "files to be given another backing file, renamed or deleted. If QEMU copies, or base is "
        "raw, or data goes in place as a volume has no room for it twice, then data is written "
        "over base's own: top hides it, so that no data is lost, but base by itself is no longer "
        "the snapshot that it was, and nothing would say so once the merge was forgotten. A live "
        "merge is finished by `chainmerge live resume`, or by a merge of the closed images once "
        "the VM is stopped. Nothing was changed."
    )
    top: str
    base: str
    reason: str
    command: str
