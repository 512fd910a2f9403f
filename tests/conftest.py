# SPDX-License-Identifier: Apache-2.0
"""What this machine can do, how thorough the run is, and which tests it takes."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from chainmerge.records.files import STATE_DIRECTORY
from tests.support import machine
from tests.support.loopdev import mounted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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


@pytest.fixture(scope="session", autouse=True)
def _state_directory_of_this_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is recorded of block devices stays out of the machine's own records.

    Without loop devices nothing is recorded there.
    """
    if not machine.has_loop_devices():
        yield
        return
    STATE_DIRECTORY.mkdir(parents=True, exist_ok=True)
    with mounted("--bind", tmp_path_factory.mktemp("state"), STATE_DIRECTORY):
        yield


@pytest.fixture(scope="module", autouse=True)
def _state_directory_empty_again(_state_directory_of_this_run: None) -> Iterator[None]:
    """No module's tests read what those of others have left: that would take longer and longer."""
    yield
    if machine.has_loop_devices():
        for file in STATE_DIRECTORY.iterdir():
            file.unlink()


@pytest.fixture(scope="session", autouse=True)
def _history_of_this_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What is kept of merges and scans stays out of this user's own history."""
    home = tmp_path_factory.mktemp("state-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(home))
        yield home / "chainmerge"


@pytest.fixture(autouse=True)
def _history_empty_again(_history_of_this_run: Path) -> Iterator[None]:
    """What a plan says of the time that a merge takes does not hang on other tests."""
    yield
    shutil.rmtree(_history_of_this_run, ignore_errors=True)
