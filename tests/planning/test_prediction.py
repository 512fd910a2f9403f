# SPDX-License-Identifier: Apache-2.0
"""How long a merge takes is found from merges of other sizes, whatever went wrong with some."""

from __future__ import annotations

import random
from statistics import median

import pytest

from chainmerge.planning.prediction import FEWEST_MERGES, Measured, predicted_duration
from chainmerge.planning.workload import Effort

MIB = 1 << 20


class Storage:
    """Merges on a storage of which the costs are known, with some noise."""

    def __init__(self, seed: int, *, each: float, speed: float, cluster: float = 0.0) -> None:
        self._random = random.Random(seed)
        self._each, self._speed, self._cluster = each, speed, cluster

    def merge(self, noise: float, low: int = MIB, high: int = 64 << 30) -> Measured:
        draw = self._random
        size = int(low * (high / low) ** draw.random())
        clusters = int(size / 65536 * draw.random())
        seconds = self._each + size / self._speed + clusters * self._cluster
        return Measured(Effort(size, clusters), seconds * draw.lognormvariate(0, noise))


STORAGES = [
    {"each": 0.2, "speed": 1.5e9},
    {"each": 2.0, "speed": 8e7},
    {"each": 0.1, "speed": 5e8, "cluster": 1e-4},
    {"each": 0.0, "speed": 1e8},
]


@pytest.mark.parametrize("costs", STORAGES)
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.2])
def test_after_ten_merges_the_median_error_is_below_30_percent(
    costs: dict[str, float], noise: float
) -> None:
    errors = []
    for seed in range(25):
        storage = Storage(seed, **costs)
        earlier = [storage.merge(noise) for _ in range(10)]
        actual = storage.merge(noise)
        found = predicted_duration(actual.effort, earlier)
        assert found is not None
        errors.append(abs(found.likely / actual.seconds - 1))
    assert median(errors) < (0.01 if not noise else 0.3)


def test_without_noise_it_is_exact() -> None:
    storage = Storage(1, each=0.5, speed=1e8, cluster=1e-4)
    earlier = [storage.merge(0.0) for _ in range(6)]
    actual = storage.merge(0.0)
    found = predicted_duration(actual.effort, earlier)
    assert found is not None
    assert found.likely == pytest.approx(actual.seconds, rel=1e-3)
    assert found.low < found.likely < found.high


@pytest.mark.parametrize("slow", [1, 2, 3])
def test_merges_that_had_to_wait_do_not_count_for_all(slow: int) -> None:
    storage = Storage(2, each=0.5, speed=1e8)
    earlier = [storage.merge(0.05) for _ in range(12)]
    earlier[:slow] = [Measured(one.effort, one.seconds * 20) for one in earlier[:slow]]
    actual = storage.merge(0.0)
    found = predicted_duration(actual.effort, earlier)
    assert found is not None
    assert found.likely == pytest.approx(actual.seconds, rel=0.3)
    # But the range says that it may happen again.
    assert found.high > 2 * found.likely


def test_most_merges_lie_in_the_range() -> None:
    inside = 0
    for seed in range(100):
        storage = Storage(seed, each=0.3, speed=3e8)
        earlier = [storage.merge(0.2) for _ in range(20)]
        actual = storage.merge(0.2)
        found = predicted_duration(actual.effort, earlier)
        assert found is not None
        inside += found.low <= actual.seconds <= found.high
    assert 65 <= inside <= 95


def test_few_merges_say_nothing() -> None:
    storage = Storage(1, each=0.5, speed=1e8)
    earlier = [storage.merge(0.0) for _ in range(FEWEST_MERGES - 1)]
    assert predicted_duration(Effort(MIB, 1), []) is None
    assert predicted_duration(Effort(MIB, 1), earlier) is None


@pytest.mark.parametrize("effort", [Effort(0, 0), Effort(MIB, 16)])
def test_merges_that_are_all_alike(effort: Effort) -> None:
    earlier = [Measured(effort, seconds) for seconds in (1.0, 1.1, 1.2, 1.3, 9.0)]
    found = predicted_duration(effort, earlier)
    assert found is not None
    assert found.likely == pytest.approx(1.2, abs=0.05)
    assert found.low <= 1.1
    assert found.high >= 1.3


def test_impossible_times_do_no_harm() -> None:
    earlier = [Measured(Effort(size, 0), 0.0) for size in (0, 1, 2, 3, 1 << 60)]
    found = predicted_duration(Effort(1 << 62, 1 << 40), earlier)
    assert found is not None
    assert 0 < found.low <= found.likely <= found.high
