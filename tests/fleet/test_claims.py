# SPDX-License-Identifier: Apache-2.0
"""Jobs that a worker has claimed, when it dies or when the database does not answer."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from chainmerge.fleet.engine import MOST_CLAIMED
from tests.support.fleet import is_merged, wait_until

if TYPE_CHECKING:
    from tests.support.fleet import Fleet


def test_a_dead_worker_had_two_jobs_that_ask_for_the_same(fleet: Fleet) -> None:
    host = fleet.host("h1", connect='""')
    fleet.register(host)
    fleet.did("pause", "scan/h1")
    host.start()
    fleet.did("scan")
    wait_until(fleet.claimed, "a scan that is claimed")
    # As rows were queued before: the queue itself lets a second one wait as soon as one is claimed.
    fleet.execute(
        "INSERT INTO procrastinate_jobs (queue_name, task_name, priority, queueing_lock, args)"
        " SELECT queue_name, task_name, priority, queueing_lock, args FROM procrastinate_jobs"
    )
    wait_until(lambda: len(fleet.claimed()) == 2, "both are claimed")
    host.kill()
    fleet.did("limit", "scan/h1", "1")
    jobs = fleet.submit(host.planned(host.chain("disk")))
    host.start()
    assert fleet.wait_for_results(jobs, 30) == dict.fromkeys(jobs, "done")
    wait_until(lambda: len(fleet.outcomes()) == 3, "the end of both scans")


def test_a_queue_that_does_not_answer_when_a_job_ends(fleet: Fleet) -> None:
    host = fleet.host("h1", connect='""')
    top = host.chain("disk", 4)
    (job,) = fleet.submit(host.planned("--bandwidth", "2M", top))
    host.start()
    wait_until(lambda: fleet.running() == [job], "a merge that runs")
    said = host.directory / "worker.err"
    ((backend,),) = fleet.ask(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
        " AND query LIKE '%%procrastinate_fetch_job%%' AND pid <> pg_backend_pid()"
    )
    os.kill(backend, signal.SIGSTOP)
    try:
        assert fleet.wait_for_results([job]) == {job: "done"}
        missed = "the queue does not know yet what became of a job"
        wait_until(lambda: missed in said.read_text(), "the worker gives the queue up")
    finally:
        os.kill(backend, signal.SIGCONT)
    wait_until(lambda: not fleet.claimed(), "the queue knows of its end", 90)
    assert is_merged(top)
    assert host.stop() == 0
    assert "Traceback" not in said.read_text()


def test_a_row_that_is_too_deep_holds_up_no_others(fleet: Fleet) -> None:
    host = fleet.host("h1", connect='""')
    for depth in (900, 3000):
        deep = "[" * depth + "]" * depth
        fleet.execute(
            "INSERT INTO procrastinate_jobs (queue_name, task_name, priority, args)"
            f" VALUES ('host.h1', 'chainmerge.fleet', 1000, '{{\"record\": {deep}}}')"
        )
    rows = [one["job"] for one in fleet.did("status")["jobs"]]
    assert len(rows) == 2
    jobs = fleet.submit(host.planned(host.chain("disk")))
    host.start()
    assert fleet.wait_for_results(jobs, 20) == dict.fromkeys(jobs, "done")
    assert fleet.wait_for_results(rows, 20) == dict.fromkeys(rows, "rejected")


def test_once_is_over_where_more_jobs_wait_than_can_be_claimed(fleet: Fleet) -> None:
    host = fleet.host("h1", connect='""')
    fleet.did("pause", "fleet")
    fleet.submit(host.planned(host.chain("disk")))
    fleet.execute(
        "INSERT INTO procrastinate_jobs (queue_name, task_name, priority, args)"
        " SELECT queue_name, task_name, priority, args FROM procrastinate_jobs,"
        f" generate_series(1, {MOST_CLAIMED})"
    )
    assert host.start("--once").wait(120) == 0
    assert fleet.outcomes() == {}
