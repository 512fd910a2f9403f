# SPDX-License-Identifier: Apache-2.0
"""What this machine can do, how thorough the run is, and which tests it takes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, settings

from tests.support import machine

if TYPE_CHECKING:
    import pytest

SOAK = os.environ.get("CHAINMERGE_SOAK") == "1"

# An example runs real processes on real images: how long one takes says nothing.
_patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("default", _patient, max_examples=25)
settings.register_profile(
    "ci", _patient, max_examples=25, derandomize=True, database=None, print_blob=True
)
settings.register_profile("soak", _patient, max_examples=500, print_blob=True)
settings.load_profile(os.environ.get("CHAINMERGE_PROFILE", "soak" if SOAK else "default"))


def pytest_report_header() -> list[str]:
    return [f"machine: {line}" for line in machine.capabilities()]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take the long runs out unless they were asked for; a deselected test is no skipped one."""
    if SOAK:
        return
    long_runs = [item for item in items if item.get_closest_marker("soak")]
    if long_runs:
        config.hook.pytest_deselected(items=long_runs)
        items[:] = [item for item in items if not item.get_closest_marker("soak")]
