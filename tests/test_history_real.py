# SPDX-License-Identifier: Apache-2.0
"""Random lives of a disk on real images."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.model.disk_history import Backend
from tests.model.lockstep import Lockstep
from tests.model.machine import KilledMergesMachine
from tests.model.memory import MemoryBackend
from tests.model.real import RealBackend, Workshop, scratch_directory

PATIENT = settings(deadline=None, suppress_health_check=list(HealthCheck), stateful_step_count=10)


@pytest.fixture
def workshop() -> Iterator[Workshop]:
    with scratch_directory() as directory, Workshop(Path(directory)) as workshop:
        yield workshop


def real_machine(workshop: Workshop) -> type[KilledMergesMachine]:
    """Lives of which the images and the model must tell the same."""

    class Machine(KilledMergesMachine):
        max_images = 5

        def make_backend(self, variety: int) -> Backend:
            self.real = workshop.backend(variety)
            return Lockstep(MemoryBackend(), self.real)

        def teardown(self) -> None:
            if not hasattr(self, "history"):
                return
            # A history that has failed already is what people want to hear of.
            if sys.exc_info()[0] is None:
                spoiled = self.history.spoiled
                self.real.ask_qemu([i for i in self.history.images if i not in spoiled])
            self.real.throw_away()

    return Machine


def test_random_lives(workshop: Workshop) -> None:
    run_state_machine_as_test(real_machine(workshop), settings=settings(PATIENT, max_examples=12))
