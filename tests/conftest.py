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
OTHER_QEMU = "CHAINMERGE_OTHER_QEMU" in os.environ

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
    """Take out what was not asked for; a deselected test is no skipped one."""
    unasked = {name for name, asked in (("soak", SOAK), ("two_qemus", OTHER_QEMU)) if not asked}
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in unasked)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
