# SPDX-License-Identifier: Apache-2.0
"""The yardstick: as many bytes copied as fast as the disk permits."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from benchmarks.harness import Contender

if TYPE_CHECKING:
    from pathlib import Path

NAME: Final = "direct copy"
_BLOCK: Final = 4 << 20


def direct_copy(directory: Path, size: int) -> Contender:
    """A copy of a file of *size* bytes in *directory*, past the page cache, made durable."""
    source, target = directory / "copy-source", directory / "copy-target"
    block = os.urandom(_BLOCK)
    with source.open("wb") as file:
        for start in range(0, size, _BLOCK):
            file.write(block[: size - start])

    def prepare() -> None:
        target.unlink(missing_ok=True)

    command = (
        *("dd", f"if={source}", f"of={target}", f"bs={_BLOCK}"),
        *("iflag=direct", "oflag=direct", "conv=notrunc,fsync", "status=none"),
    )
    return Contender(NAME, (command,), prepare)
