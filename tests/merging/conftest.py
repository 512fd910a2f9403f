# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.merge_scenario import Scenario, build

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def scenario_template(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    return build(tmp_path_factory.mktemp("scenario") / "chain")


@pytest.fixture
def scenario(scenario_template: Scenario, tmp_path: Path) -> Scenario:
    return scenario_template.copy_to(tmp_path / "chain")
