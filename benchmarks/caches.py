# SPDX-License-Identifier: Apache-2.0
"""Letting the kernel forget what it has read, so that every run reads from the disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_CONTROL: Final = Path("/proc/sys/vm/drop_caches")


def can_drop_caches() -> bool:
    """Whether this process may."""
    return os.access(_CONTROL, os.W_OK)


def drop_caches() -> None:
    """Write everything back, then drop pages, directory entries and inodes."""
    os.sync()
    _CONTROL.write_text("3\n", encoding="ascii")
