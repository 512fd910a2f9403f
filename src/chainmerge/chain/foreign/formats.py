# SPDX-License-Identifier: Apache-2.0
"""Which other formats a chain may stand on, and how QEMU is told to open such an image."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from chainmerge.chain.errors import ForeignUnreadable
from chainmerge.chain.reading import open_image
from chainmerge.storage.errors import reason_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.chain.model import ImageInfo

FOREIGN_FORMATS: Final = frozenset({"parallels", "qed", "vdi", "vhdx", "vmdk", "vpc"})
"""What the lowest image of a chain may be, besides qcow2 and raw."""

# By an image that its guest, or who uploaded it, may have written, QEMU is not to be made to take
# more: of memory in bytes, where each of its threads reserves more than it uses, of processor time
# in seconds.
LIMITS_TO_LOOK: Final = ("prlimit", f"--as={4 << 30}", "--cpu=60")
LIMITS_TO_READ: Final = ("prlimit", f"--as={16 << 30}")

# Those that can have a backing file of their own, which is not to be opened.
_COW_FORMATS: Final = frozenset({"qed", "vmdk"})


class QemuName(Struct, frozen=True):
    """What a program of QEMU is told for an image, and the descriptor that it needs for that."""

    filename: str
    descriptors: tuple[int, ...]
    path: str

    def said(self, messages: bytes) -> str:
        """What a program has said on standard error, as the end of a sentence."""
        text = messages.decode(errors="replace").replace(self.filename, self.path)
        lines = (line.strip() for line in text.splitlines())
        return "; ".join(filter(None, lines)) or "it did not say why"


@contextmanager
def opened_for_qemu(image: ImageInfo) -> Iterator[QemuName]:
    """Open an image for a program of QEMU that is about to be started.

    It gets the very file that was found. Only an image whose data is in other files too is
    reached by its name, as the others are named relative to it.

    Raises:
        ImageReplaced: there is another image under its name.
        ForeignUnreadable: it has a name that QEMU cannot be told.
        Refused: it cannot be opened.
    """
    with open_image(image) as readable:
        path = str(image.real_path) if image.extents else f"/proc/self/fd/{readable.fd}"
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise unreadable(image, "its name is not valid UTF-8") from error
        yield QemuName(f"json:{json.dumps(_options(image, path))}", (readable.fd,), str(image.path))


def _options(image: ImageInfo, path: str) -> dict[str, object]:
    options: dict[str, object] = {
        "driver": image.format,
        "read-only": True,
        "file": {
            "driver": "host_device" if image.is_block_device else "file",
            "filename": path,
            "read-only": True,
            # Who writes to an image of the chain locks all of them.
            "locking": "off",
        },
    }
    if image.format in _COW_FORMATS:
        options["backing"] = None
    return options


def unreadable(image: ImageInfo, reason: str) -> ForeignUnreadable:
    """The refusal of an image that cannot be read."""
    return ForeignUnreadable(str(image.path), image.format, reason)


def not_started(image: ImageInfo, program: str, error: OSError) -> ForeignUnreadable:
    """The refusal where a program of QEMU does not start."""
    return unreadable(image, f"{program} does not start: {reason_of(error)}")
