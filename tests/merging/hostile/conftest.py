# SPDX-License-Identifier: Apache-2.0
"""Images that merge, each test with a copy of its own to spoil."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.hostile import (
    Victim,
    build,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    return build(tmp_path_factory.mktemp("hostile") / "images")


@pytest.fixture
def victim(template: Victim, tmp_path: Path) -> Victim:
    return template.copy_to(tmp_path / "images")
