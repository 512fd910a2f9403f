# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with what an earlier run left, whichever of its files it is about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from chainmerge.errors import Refused


@dataclass(eq=False)
class LeftoverUnclear(Refused):
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
