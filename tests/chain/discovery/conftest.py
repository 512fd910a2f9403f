# SPDX-License-Identifier: Apache-2.0
"""Images to start with."""

from pathlib import Path

import pytest

from tests.chain.overlays import SIZE, overlay
from tests.support import qemu


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A directory with the chain base <- middle <- top."""
    directory = tmp_path / "images"
    directory.mkdir()
    qemu.create(directory / "base", SIZE)
    overlay(directory / "middle", "base")
    overlay(directory / "top", "middle")
    return directory
