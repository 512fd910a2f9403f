# SPDX-License-Identifier: Apache-2.0
"""What the tests of this package share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.fake_lvm import FakeLvm

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def fake_lvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeLvm:
    """An ``lvm`` whose volumes are files."""
    found = FakeLvm(tmp_path / "lvm")
    found.install(monkeypatch)
    return found
