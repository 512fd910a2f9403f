# SPDX-License-Identifier: Apache-2.0
"""What is released, as ``make dist`` has left it, and machines to install it on."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from release.debian import DEBIANS, Debian

ROOT: Final = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def dist() -> Path:
    directory = ROOT / "dist"
    assert (directory / "SHA256SUMS").exists(), "run make dist first"
    return directory


@pytest.fixture(params=DEBIANS, ids=lambda debian: debian.codename, scope="module")
def debian(request: pytest.FixtureRequest) -> Debian:
    found: Debian = request.param
    return found


def one(directory: Path, pattern: str) -> Path:
    """The only file of a name like that."""
    (found,) = directory.glob(pattern)
    return found
