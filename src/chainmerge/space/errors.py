# SPDX-License-Identifier: Apache-2.0
"""Why base cannot take what is to be merged into it, however large its volume."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from chainmerge.errors import Refused


@dataclass(eq=False)
class CannotGrowBase(Refused):
    """Base's virtual disk cannot be made as large as top's."""

    code: ClassVar[str] = "cannot-grow-base"
    template: ClassVar[str] = "{image}: its disk cannot grow to top's {size} bytes: {reason}"
    hint: ClassVar[str] = (
        "pull instead (--direction pull), which leaves {image} as it is; do not shrink top: what "
        "the guest has behind the new end would be lost"
    )
    explanation: ClassVar[str] = (
        "A merge makes base's virtual disk as large as top's. QEMU cannot do that to an image of "
        "version 2 that has internal snapshots, or whose backing file is longer than it is (it "
        "has no way to hide the part that would come to light), nor to one with extended L2 "
        "entries whose backing file is longer and whose last cluster is compressed; and the "
        "first-level table of an image is limited to 32 MiB. Nothing was changed."
    )
    image: str
    size: int
    reason: str
