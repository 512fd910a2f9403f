# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with the files that an earlier run left, whichever file it is."""

from __future__ import annotations

from typing import ClassVar

from chainmerge.errors import CheckpointsAtRisk, NewerDataAtRisk, RecordsUnusable, Refused


class LeftoverUnclear(RecordsUnusable, Refused):
    """A file of an earlier run is about an image, and nobody knows whether that is still there."""

    code: ClassVar[str] = "leftover-unclear"
    template: ClassVar[str] = (
        "{file} belongs to a merge of {image}, and nothing shows whether the image that is there "
        "now is still the same one"
    )
    hint: ClassVar[str] = (
        "find out whether {image} has been replaced since; if it has, or if nothing of that merge "
        "is left to do, remove {file}; {consequence}"
    )
    explanation: ClassVar[str] = (
        "What an interrupted merge leaves is used for the same images only. A file is identified "
        "by its inode together with its birth time or its generation, and some file systems keep "
        "neither. A block device is identified by what the device-mapper or the device itself "
        "says; without that, it can be identified only until the next boot. Taking one image for "
        "another could delete newer data, or make a checkpoint out of another image's bits. "
        "Nothing was changed."
    )
    file: str
    image: str
    consequence: str


class BitmapsSetAside(CheckpointsAtRisk, Refused):
    """An image to be merged has its checkpoints in the file of an interrupted merge."""

    code: ClassVar[str] = "bitmaps-set-aside"
    template: ClassVar[str] = (
        "the checkpoints {names} of {image} are in {file}, where an interrupted merge into it has "
        "set them aside: if the image were merged as it is, they would be lost, or would lose bits"
    )
    hint: ClassVar[str] = (
        "finish that merge first: `chainmerge status {image}` prints the command; if the images "
        "have changed too much for it, that command says what happens to the checkpoints"
    )
    explanation: ClassVar[str] = (
        "While QEMU copies data into an image, that image's checkpoints are kept in a small file "
        "beside it. As long as they are there, the image itself does not show them. A merge of it "
        "into another image would take them for broken, and the first merge, finished later, would "
        "put them back without what the other images had recorded. Nothing was changed."
    )
    image: str
    names: str
    file: str


class MergedBefore(NewerDataAtRisk, Refused):
    """Top was merged before, and base has been written to since: it would get old data."""

    code: ClassVar[str] = "merged-before"
    template: ClassVar[str] = (
        "{top} was merged into {base} before, and since then {base} has been written to and {top} "
        "has not: another merge would overwrite new data with old"
    )
    hint: ClassVar[str] = (
        "if the guest uses {base} now, nothing is left to do, and {top} is not needed any more; "
        "only if {base} was put back as it was before that merge, go on with --despite-newer-base, "
        "which overwrites what {base} has with what {top} has"
    )
    explanation: ClassVar[str] = (
        "After a merge without --delete top stays where it is, and nothing in it shows that all of "
        "it is in base. A guest that continues with base writes data there that top does not have. "
        "The record of the merge, a small file beside top, says which image was merged and when it "
        "was last changed, so that the same command, run again, does not destroy that data. "
        "Nothing was changed."
    )
    top: str
    base: str
