# SPDX-License-Identifier: Apache-2.0
"""When limits are reached, from lines of scans; nothing where nothing grows."""

from __future__ import annotations

import random

import pytest
from msgspec.structs import replace

from chainmerge.documents.trends import Forecast, Limited
from chainmerge.inventory.forecast import FEWEST_SCANS, forecasts
from chainmerge.records.history import Level, ScanLine
from tests.records.test_history import SCAN

DAY = 86_400
GIB = 1 << 30


def scans(
    values: list[int], kind: Limited = Limited.CHAIN, limit: int = 0, every: int = DAY
) -> list[ScanLine]:
    return [
        replace(SCAN, at=number * every, levels=(Level(kind, "name", value, limit, "path"),))
        for number, value in enumerate(values)
    ]


def test_a_chain_that_grows_by_one_a_day() -> None:
    assert forecasts(scans(list(range(10, 30))), 200) == (
        Forecast(Limited.CHAIN, "name", "path", 29, 200, 19 * DAY + 171 * DAY, 20),
    )


def test_a_file_system_fills() -> None:
    used = [50 * GIB + day * GIB for day in range(8)]
    (found,) = forecasts(scans(used, Limited.FILE_SYSTEM, 100 * GIB), 200)
    assert (found.kind, found.limit) == (Limited.FILE_SYSTEM, 100 * GIB)
    assert found.reached_at == 7 * DAY + 43 * DAY


def test_the_limit_of_chains_is_that_of_now() -> None:
    found = [forecasts(scans(list(range(10, 20))), limit)[0] for limit in (50, 100)]
    assert found[0].reached_at < found[1].reached_at


@pytest.mark.parametrize(
    "values",
    [
        [],
        [5],
        list(range(FEWEST_SCANS - 1)),
        [7] * 20,
        list(range(30, 5, -1)),
        # Thinned out as fast as it grows.
        [5, 6, 7, 8, 9] * 6,
        # At its limit already: a finding says so.
        list(range(180, 201)),
        # Not within a year.
        [10] * 5 + [10 + day // 30 for day in range(60)],
    ],
)
def test_nothing_is_foretold(values: list[int]) -> None:
    assert forecasts(scans(values), 200) == ()


def test_one_afternoon_says_nothing() -> None:
    values = list(range(20))
    assert forecasts(scans(values, every=3600), 200) == ()
    assert forecasts(scans([*values, *range(20, 30)], every=3600), 200) != ()


@pytest.mark.parametrize("values", [[*range(20, 40), 1, 2, 3], [*range(1, 20), *range(1, 40)]])
def test_a_merge_does_not_change_how_fast_it_grows(values: list[int]) -> None:
    (found,) = forecasts(scans(values), 200)
    assert found.reached_at == (len(values) - 1 + 200 - values[-1]) * DAY


def test_noise_counts_little() -> None:
    draw = random.Random(1)
    used = [(20 + day) * GIB + draw.randrange(-GIB, GIB) for day in range(30)]
    used[10] += 30 * GIB
    (found,) = forecasts(scans(used, Limited.DEVICE, 100 * GIB), 200)
    assert found.reached_at == pytest.approx(79 * DAY, rel=0.05)


def test_many_scans_are_thinned_and_the_old_ones_left_out() -> None:
    hourly = [100 + hour // 24 for hour in range(24 * 70)]
    (found,) = forecasts(scans(hourly, every=3600), 200)
    assert found.scans <= 100
    # By its growth of late: 31 are left, one a day.
    assert found.reached_at == pytest.approx((70 + 31) * DAY, abs=3 * DAY)


def test_what_is_first_comes_first() -> None:
    lines = [
        replace(
            SCAN,
            at=day * DAY,
            levels=tuple(
                Level(Limited.CHAIN, name, 10 + day * growth, 0, name)
                for name, growth in (("slow", 1), ("fast", 4), ("still", 0))
            ),
        )
        for day in range(6)
    ]
    assert [one.name for one in forecasts(lines, 200)] == ["fast", "slow"]


def test_a_clock_that_was_set_back_does_no_harm() -> None:
    lines = scans(list(range(10)))
    assert len(forecasts([*lines, *lines], 200)) <= 1
