# SPDX-License-Identifier: Apache-2.0
"""What a recorded device's content is rebuilt on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class MemoryMedium:
    """A device in memory."""

    def __init__(self, content: bytes) -> None:
        self._content = bytearray(content)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self._content[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        self._content[offset : offset + len(data)] = data

    def copy(self) -> MemoryMedium:
        return MemoryMedium(bytes(self._content))


class FileMedium:
    """A device in a file, which can be mounted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._fd, length, offset).ljust(length, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        os.pwrite(self._fd, data, offset)

    def close(self) -> None:
        os.close(self._fd)
