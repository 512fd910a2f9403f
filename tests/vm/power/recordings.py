# SPDX-License-Identifier: Apache-2.0
"""Where recordings are kept between the machine and those who judge them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tests.vm.power.cases import PowerCase

RECORDINGS: Final = Path(__file__).parents[3] / "build" / "vm" / "recordings"


def directory_of(case: str) -> Path:
    return RECORDINGS / case.replace(" ", "-").replace(",", "")


def mount_point_of(case: PowerCase) -> Path:
    """Where a case's file system is mounted, here and there: records of merges have full paths."""
    return Path("/tmp") / f"chainmerge-{case.storage}"
