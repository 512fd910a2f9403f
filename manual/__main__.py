# SPDX-License-Identifier: Apache-2.0
"""``python -m manual man DIRECTORY`` and the like; see the Makefile."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from manual.completions import write_completions
from manual.man_pages import write_man_pages
from manual.site_source import write_site_source

MADE: Final = {
    "completions": write_completions,
    "man": write_man_pages,
    "site-source": write_site_source,
}


def main() -> None:
    """Make what is named first, in the directory that is named next."""
    kind, directory = sys.argv[1:]
    MADE[kind](Path(directory))


if __name__ == "__main__":
    main()
