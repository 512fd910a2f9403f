# SPDX-License-Identifier: Apache-2.0
"""What a journal is told: one line a step, as it says at its level."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

import pytest

from chainmerge.documents.log import PRIORITIES
from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.report.log import Log, LogProgress, renderer
from chainmerge.storage.errors import ImageMissing

if TYPE_CHECKING:
    from chainmerge.documents.log import LogFormat, LogLevel

MIB = 1 << 20


def told(level: LogLevel, log_format: LogFormat = "text", *, in_journal: bool = True) -> list[str]:
    """The lines of a merge of two seconds a step, at times with little between."""
    stream = io.StringIO()
    now = [0.0]
    log = Log(stream, renderer(log_format, in_journal=in_journal), level, lambda: 86400.0 + now[0])
    with LogProgress(log, lambda: now[0]) as progress:
        progress.update(ProgressEvent(Stage.LOCK))
        now[0] += 2
        progress.update(ProgressEvent(Stage.COPY, 0, 30 * MIB))
        for done in range(1, 30):
            now[0] += 1
            progress.update(ProgressEvent(Stage.COPY, done * MIB, 30 * MIB, MIB))
        progress.update(ProgressEvent(Stage.COPY, 0, 30 * MIB, top="/srv/b\n.qcow2"))
        log.warn("look at this")
        log.fail(ImageMissing("/srv/c.qcow2"))
    return stream.getvalue().splitlines()


def test_a_line_a_step() -> None:
    *lines, error, end = told("info")
    assert lines == [
        "<6>locking the images",
        "<6>copying data",
        r"<6>/srv/b\n.qcow2: copying data",
        "<4>look at this",
    ]
    assert error.startswith("<3>/srv/c.qcow2: no such file (image-missing); check the name")
    assert end == "<6>ended after 31.0 s"


def test_how_far_a_step_has_come_is_for_debugging() -> None:
    more = [line for line in told("debug") if line.startswith("<7>")]
    assert len(more) == 2
    assert more[0] == "<7>copy: 10.0 MiB of 30.0 MiB, 1.0 MiB/s, 20 s left"


@pytest.mark.parametrize(("level", "least"), PRIORITIES.items())
def test_what_is_less_important_is_left_out(level: LogLevel, least: int) -> None:
    found = {int(line[1]) for line in told(level)}
    assert found == {number for number in PRIORITIES.values() if number <= least}


def test_what_is_not_the_journal_has_no_time_and_level_of_its_own() -> None:
    first, *_ = told("info", in_journal=False)
    assert first == "1970-01-02T00:00:00Z info: locking the images"


def test_each_line_is_json() -> None:
    lines = [json.loads(line) for line in told("debug", "json", in_journal=False)]
    assert lines[0] == {
        "time": 86400.0,
        "level": "info",
        "kind": "step",
        "message": "locking the images",
        "stage": "lock",
    }
    assert [one["kind"] for one in lines if one["kind"] != "step"] == [
        "progress", "progress", "warning", "error", "end",
    ]  # fmt: skip
    assert told("info", "json")[0].startswith("<6>{")
