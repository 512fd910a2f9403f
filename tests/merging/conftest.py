# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from tests.support.merge_scenario import scenario, scenario_template

__all__ = ["scenario", "scenario_template"]
