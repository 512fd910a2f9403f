# SPDX-License-Identifier: Apache-2.0
"""What people see who watch a fleet."""

from __future__ import annotations

from msgspec.structs import replace

from chainmerge.documents.fleet import FleetJobState, FleetJobStatus, FleetStatus
from chainmerge.report.fleet_watch import Rates, watch_line, watch_report
from chainmerge.report.plain import plain_text

MIB = 1 << 20
RUNNING = FleetJobStatus(
    job=1,
    host="h1",
    state=FleetJobState.RUNNING,
    action="merge",
    top="/images/a",
    base="/images/b",
    priority=0,
    waits_for=(),
    cancelled=False,
    progress="copy",
    bytes_done=0,
    bytes_total=100 * MIB,
)
WAITING = replace(
    RUNNING,
    job=2,
    state=FleetJobState.WAITING,
    waits_for=("host/h1 (1 of 1)",),
    progress=None,
    bytes_done=None,
    bytes_total=None,
)


def with_done(done: int) -> FleetStatus:
    return FleetStatus(1, (replace(RUNNING, bytes_done=done), WAITING), (), ())


def test_a_rate_is_that_of_the_last_seconds() -> None:
    rates = Rates()
    assert rates.see(with_done(0), 0.0) == {}
    assert rates.see(with_done(10 * MIB), 5.0) == {1: 2 * MIB}
    for second in range(6, 40):
        found = rates.see(with_done((10 + second - 5) * MIB), float(second))
    assert found == {1: MIB}, "what was long ago does not count"
    assert rates.see(with_done(MIB), 41.0) == {}, "another stage has begun"
    assert rates.see(FleetStatus(1, (), (), ()), 42.0) == {}


def test_what_is_left_is_said() -> None:
    status, rates = with_done(40 * MIB), {1: 2.0 * MIB}
    assert watch_line(status, rates) == "1 job running, 1 waiting, 60 MiB left, 2.0 MiB/s"
    text = plain_text(watch_report(status, rates))
    assert "40 MiB of 100 MiB" in text
    assert "30 s" in text
    assert "host/h1 (1 of 1)" in text


def test_a_long_queue_does_not_fill_the_screen() -> None:
    status = FleetStatus(1, tuple(replace(WAITING, job=job) for job in range(1000)), (), ())
    text = plain_text(watch_report(status, {}))
    assert len(text.splitlines()) < 20
    assert "990 more jobs waiting" in text
