# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with what an earlier run left, whichever of its files it is about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from chainmerge.errors import CheckpointsAtRisk, NewerDataAtRisk, RecordsUnusable, Refused


@dataclass(eq=False)
class LeftoverUnclear(RecordsUnusable, Refused):
    """A file that an earlier run left is of an image of which nobody knows whether it is there."""

    code: ClassVar[str] = "leftover-unclear"
    template: ClassVar[str] = (
        "{file} tells of a merge in which {image} took part, and nothing tells whether what "
        "stands there now is still that image"
    )
    hint: ClassVar[str] = (
        "find out whether {image} was replaced since; where it was, or where nothing of that "
        "merge is left to do, remove {file}; {consequence}"
    )
    explanation: ClassVar[str] = (
        "What an interrupted merge leaves is used for the same images only. A file is known by "
        "its inode together with its time of birth or its generation, which some file systems "
        "keep neither of; a block device by the identity that the device-mapper or the device "
        "itself gives it, which some do not have, and which else is known until the next boot "
        "only. Taking one image for another could delete what came later, or make a checkpoint "
        "of bits that are another image's. Nothing was changed."
    )
    file: str
    image: str
    consequence: str


@dataclass(eq=False)
class BitmapsSetAside(CheckpointsAtRisk, Refused):
    """An image that would be merged has its checkpoints in the file of an interrupted merge."""

    code: ClassVar[str] = "bitmaps-set-aside"
    template: ClassVar[str] = (
        "{image} has the checkpoints {names} in {file}, where an interrupted merge into it has set "
        "them aside: merged as it is, it would lose them, or they would lose bits"
    )
    hint: ClassVar[str] = (
        "finish that merge first: `chainmerge status {image}` prints the command; if the images "
        "have changed too much for it, the command says what becomes of the checkpoints"
    )
    explanation: ClassVar[str] = (
        "While QEMU copies data into an image, that image's checkpoints are kept in a small file "
        "beside it. As long as they are there, the image itself says nothing of them. A merge of "
        "it into another image would take them for broken, and the first merge, finished later, "
        "would put them back without what the other images had recorded. Nothing was changed."
    )
    image: str
    names: str
    file: str


@dataclass(eq=False)
class MergedBefore(NewerDataAtRisk, Refused):
    """Top was merged before, and base has been written to since: it would get old data."""

    code: ClassVar[str] = "merged-before"
    template: ClassVar[str] = (
        "{top} was merged into {base} before and has not been written to since, but {base} has: "
        "merged again, it would put old data over new"
    )
    hint: ClassVar[str] = (
        "if the guest uses {base} now, nothing is left to do, and {top} can go; only if {base} "
        "was put back as it was before that merge, go on with --despite-newer-base, which puts "
        "what {top} has over what {base} has"
    )
    explanation: ClassVar[str] = (
        "After a merge without --delete top stays where it is, and nothing in it tells that all "
        "of it is in base. A guest that goes on with base writes there what top does not have. The "
        "record of the merge, a small file beside top, says which image was merged and when it was "
        "changed last, so that the same command, run again, does not destroy that. Nothing was "
        "changed."
    )
    top: str
    base: str
