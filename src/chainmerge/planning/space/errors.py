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


@dataclass(eq=False)
class OldBytesBehindEnd(Refused):
    """What base holds behind the end of its disk would come to light, and cannot be wiped."""

    code: ClassVar[str] = "old-bytes-behind-end"
    template: ClassVar[str] = (
        "{image}: its disk would have to grow to {size} bytes, and what it holds behind the "
        "present end would show: {reason}"
    )
    hint: ClassVar[str] = (
        "if --engine qemu was asked for, leave it out; else make a new image of what the overlay "
        "shows (`qemu-img convert`, which takes no checkpoints along: keep the chain until the "
        "next full backup); do not enlarge {image} by other means, the guest would see the old "
        "bytes"
    )
    explanation: ClassVar[str] = (
        "A merge makes base's virtual disk as large as top's. Where base's disk ends inside a "
        "cluster, the rest of that cluster can hold bytes of a time when the disk was larger. QEMU "
        "does not wipe them when it moves the end, so the guest would read them where it has zeros "
        "now. The native engine never shows them; where QEMU has to copy (images that are "
        "encrypted, external data files), they are wiped beforehand, unless they are encrypted, "
        "compressed or shared with an internal snapshot, or whole clusters are mapped there. "
        "Nothing was changed."
    )
    image: str
    size: int
    reason: str
