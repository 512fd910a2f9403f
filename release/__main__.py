# SPDX-License-Identifier: Apache-2.0
"""``python -m release dist [DIRECTORY]`` and ``python -m release lock``."""

from __future__ import annotations

import sys
from pathlib import Path

from release.building import build_all
from release.pins import lock
from release.project import ROOT, read_project


def main() -> int:
    match sys.argv[1:]:
        case ["dist"]:
            build_all(read_project(), ROOT / "dist")
        case ["dist", directory]:
            build_all(read_project(), Path(directory).absolute())
        case ["lock"]:
            lock(read_project())
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
