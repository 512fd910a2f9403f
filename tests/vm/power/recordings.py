# SPDX-License-Identifier: Apache-2.0
"""Where recordings are kept between the machine and those who judge them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

RECORDINGS: Final = Path(__file__).parents[3] / "build" / "vm" / "recordings"


def directory_of(case: str) -> Path:
    return RECORDINGS / case.replace(" ", "-").replace(",", "")
