# SPDX-License-Identifier: Apache-2.0
"""Why base cannot take what is to be merged into it, however large its volume."""

from __future__ import annotations

from typing import ClassVar

from chainmerge.errors import Refused


class CannotGrowBase(Refused):
    """Base's virtual disk cannot be made as large as top's."""

    code: ClassVar[str] = "cannot-grow-base"
    template: ClassVar[str] = "{image}: its disk cannot grow to top's {size} bytes: {reason}"
    hint: ClassVar[str] = (
        "pull instead (--direction pull), which leaves {image} as it is; do not shrink top: the "
        "guest's data behind the new end would be lost"
    )
    explanation: ClassVar[str] = (
        "A merge makes base's virtual disk as large as top's. QEMU cannot do that to a version 2 "
        "image that has internal snapshots, or whose backing file is longer than it is (such an "
        "image cannot hide the part that would become visible), nor to one with extended L2 "
        "entries whose backing file is longer and whose last cluster is compressed. Also, the L1 "
        "table of an image is limited to 32 MiB. Nothing was changed."
    )
    image: str
    size: int
    reason: str


class OldBytesBehindEnd(Refused):
    """What base holds behind the end of its disk would become visible, and cannot be wiped."""

    code: ClassVar[str] = "old-bytes-behind-end"
    template: ClassVar[str] = (
        "{image}: its disk would have to grow to {size} bytes, and old bytes behind the present "
        "end would become visible: {reason}"
    )
    hint: ClassVar[str] = (
        "if you gave --engine qemu, leave it out; otherwise make a new image of what the overlay "
        "shows (`qemu-img convert`, which does not copy checkpoints: keep the chain until the next "
        "full backup); do not enlarge {image} by other means: the guest would see the old bytes"
    )
    explanation: ClassVar[str] = (
        "A merge makes base's virtual disk as large as top's. Where base's disk ends inside a "
        "cluster, the rest of that cluster can hold bytes from a time when the disk was larger. "
        "QEMU does not wipe them when it moves the end, so the guest would read them where it "
        "reads zeros now. The native engine never shows them. If QEMU has to copy (encrypted "
        "images, external data files), they are wiped beforehand, unless they are encrypted, "
        "compressed or shared with an internal snapshot, or whole clusters are mapped there. "
        "Nothing was changed."
    )
    image: str
    size: int
    reason: str
