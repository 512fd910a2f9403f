# SPDX-License-Identifier: Apache-2.0
"""Merges one small overlay again and again by the API; fails if that takes ever more memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

import chainmerge

_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
# What allocators take until they have enough.
_SETTLING_MERGES: Final = 500
_GROWTH: Final = 1.05


def main() -> int:
    top, count = Path(sys.argv[1]), int(sys.argv[2])
    overlay = top.read_bytes()
    settled = 0
    for number in range(count):
        # Merged overlays are not merged again: a new file of the same content is another one.
        top.unlink()
        top.write_bytes(overlay)
        chainmerge.merge(top)
        if number == _SETTLING_MERGES:
            settled = _resident_bytes()
    if settled and _resident_bytes() > settled * _GROWTH:
        print(f"memory grew from {settled} to {_resident_bytes()} bytes", file=sys.stderr)
        return 1
    return 0


def _resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * _PAGE


if __name__ == "__main__":
    sys.exit(main())
