# SPDX-License-Identifier: Apache-2.0
"""The rate of each stage: that of its own bytes, and of the last moments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.merging.rates import RatesFilled

if TYPE_CHECKING:
    from collections.abc import Sequence

TOTAL: Final = 10_000
Moment = tuple[float, Stage, int]


def rates(moments: Sequence[Moment]) -> list[int]:
    """The rates that are told where stages are so far at these times, in seconds."""
    now = [0.0]
    told: list[ProgressEvent] = []
    report = RatesFilled(told.append, lambda: now[0])
    for now[0], stage, done in moments:
        report(ProgressEvent(stage, done, TOTAL))
    return [event.rate for event in told]


@pytest.mark.parametrize(
    ("moments", "expected"),
    [
        pytest.param(
            [(0, Stage.COPY, 0), (1, Stage.COPY, 100), (2, Stage.COPY, 300)],
            [0, 100, 150],
            id="bytes per second",
        ),
        pytest.param(
            [(0, Stage.COPY, 0), (0.1, Stage.COPY, 100), (0.5, Stage.COPY, 100)],
            [0, 0, 200],
            id="not of a moment",
        ),
        pytest.param(
            [(0, Stage.COPY, 0), (1, Stage.COPY, 500), (9, Stage.READ_BACK, 0),
             (10, Stage.READ_BACK, 20)],
            [0, 500, 0, 20],
            id="each stage has its own",
        ),
        pytest.param(
            [(0, Stage.COPY, 0), (4, Stage.COPY, 4000), (8, Stage.COPY, 4400),
             (12, Stage.COPY, 4800)],
            [0, 1000, 100, 100],
            id="a fast beginning is forgotten",
        ),
    ],
)  # fmt: skip
def test_the_rate_of_a_stage(moments: Sequence[Moment], expected: list[int]) -> None:
    assert rates(moments) == expected


def test_who_measured_is_believed_and_what_has_no_measure_has_no_rate() -> None:
    told: list[ProgressEvent] = []
    report = RatesFilled(told.append, lambda: 0.0)
    report(ProgressEvent(Stage.COPY, 1, 2, rate=77))
    report(ProgressEvent(Stage.SETTLE))
    assert [event.rate for event in told] == [77, 0]
