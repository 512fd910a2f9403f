# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import json
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TextIO, cast

import pytest
from msgspec.structs import replace
from rich.console import Console

from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.report.bar import BarProgress, line_of
from chainmerge.report.progress import (
    STAGE_WORDS,
    ForgivingStream,
    JsonProgress,
    LineProgress,
    ProgressDisplay,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass
class Clock:
    """Time that passes when the test says so."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def deaf_stream() -> Iterator[TextIO]:
    """A stream whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8", closefd=False) as stream:
        yield stream
        # What is left in its buffer has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)
    os.close(writer)


def test_every_stage_has_its_words() -> None:
    assert set(STAGE_WORDS) == set(Stage)


def test_lines_are_sparse(clock: Clock) -> None:
    out = io.StringIO()
    with LineProgress(out, clock) as progress:
        progress.update(ProgressEvent(Stage.LOCK))
        for done in range(641):
            progress.update(ProgressEvent(Stage.COPY, done, 640))
            clock.now += 1 / 32
        progress.update(ProgressEvent(Stage.COPY, 640, 640))
    assert out.getvalue().splitlines() == [
        "locking the images",
        "copying data: 0.0 B of 640.0 B (0 %)",
        "copying data: 320.0 B of 640.0 B (50 %)",
        "copying data: 640.0 B of 640.0 B (100 %)",
    ]


def test_json_lines_name_the_stage_and_the_bytes(clock: Clock) -> None:
    out = io.StringIO()
    with JsonProgress(out, clock) as progress:
        progress.update(ProgressEvent(Stage.COPY, 0, 10))
        progress.update(ProgressEvent(Stage.COPY, 5, 10))
        clock.now = 1.0
        progress.update(ProgressEvent(Stage.COPY, 6, 10))
    assert [json.loads(line)["done"] for line in out.getvalue().splitlines()] == [0, 6]


def test_bar_draws_without_a_thread(clock: Clock) -> None:
    out = io.StringIO()
    before = threading.active_count()
    with BarProgress(Console(file=out, force_terminal=True, width=120), clock) as progress:
        for stage in Stage:
            clock.now += 1
            progress.update(ProgressEvent(stage, 0, 0))
        clock.now += 1
        progress.update(ProgressEvent(Stage.COPY, 5 << 20, 10 << 20))
        assert threading.active_count() == before
    assert "5.0 MiB of 10.0 MiB" in out.getvalue()
    assert out.getvalue().count("\n") == 1, "each stage takes the line of the last one"


LONGEST: Final = ProgressEvent(
    Stage.READ_BACK, 1023 << 30, 1023 << 40, rate=999 << 20, top="/images/日本-" + "x" * 200
)


@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize("top", ["", LONGEST.top])
@pytest.mark.parametrize("stage", Stage)
def test_progress_takes_one_line(stage: Stage, top: str, width: int) -> None:
    line = line_of(replace(LONGEST, stage=stage, top=top), width)
    assert line.cell_len < width
    assert STAGE_WORDS[stage] in line.plain
    assert "999.0 MiB/s" in line.plain or "0 %" in line.plain
    assert ("日本-" in line.plain) == bool(top)


def test_a_narrow_line_still_says_how_long_it_takes() -> None:
    event = ProgressEvent(Stage.COPY, 34 << 20, 150 << 20, rate=2 << 20)
    assert line_of(event, 60).plain == "copying data 34.0 MiB of 150.0 MiB, 2.0 MiB/s, 58 s left"
    assert line_of(event, 42).plain == "copying data 22 %, 2.0 MiB/s, 58 s left"
    assert line_of(event, 80).plain.count("━") > 7


def bar_on(stream: TextIO, clock: Clock) -> BarProgress:
    return BarProgress(Console(file=stream, force_terminal=True), clock)


@pytest.mark.parametrize("kind", [LineProgress, JsonProgress, bar_on])
def test_a_reader_that_has_gone_stops_no_merge(
    kind: Callable[[TextIO, Clock], ProgressDisplay], deaf_stream: TextIO, clock: Clock
) -> None:
    stream = cast("TextIO", ForgivingStream(deaf_stream))
    with kind(stream, clock) as display:
        for done in range(100):
            clock.now += 20
            display.update(ProgressEvent(Stage.COPY, done, 100))
