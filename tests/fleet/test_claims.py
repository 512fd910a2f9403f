# SPDX-License-Identifier: Apache-2.0
"""Jobs that a worker has claimed, when it dies or when the database does not answer."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

from tests.support.fleet import is_merged, wait_until

if TYPE_CHECKING:
    from tests.support.fleet import Fleet


def claimed(fleet: Fleet) -> int:
    """How many jobs workers have in hand."""
    ((found,),) = fleet.ask("SELECT count(*) FROM procrastinate_jobs WHERE status = 'doing'")
    return int(found)


def test_a_dead_worker_had_two_jobs_that_ask_for_the_same(fleet: Fleet) -> None:
    host = fleet.host("h1", connect='""')
    assert host.start("--once").wait(60) == 0
    fleet.did("pause", "scan/h1")
    host.start()
    fleet.did("scan")
    wait_until(lambda: claimed(fleet) == 1, "a scan that is claimed")
    # As rows were queued before: the queue itself lets a second one wait as soon as one is claimed.
    fleet.execute(
        "INSERT INTO procrastinate_jobs (queue_name, task_name, priority, queueing_lock, args)"
        " SELECT queue_name, task_name, priority, queueing_lock, args FROM procrastinate_jobs"
    )
    wait_until(lambda: claimed(fleet) == 2, "both are claimed")
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
    ((backend,),) = fleet.ask(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
        " AND query LIKE '%%procrastinate_fetch_job%%' AND pid <> pg_backend_pid()"
    )
    os.kill(backend, signal.SIGSTOP)
    try:
        assert fleet.wait_for_results([job]) == {job: "done"}
        time.sleep(7)
    finally:
        os.kill(backend, signal.SIGCONT)
    wait_until(lambda: claimed(fleet) == 0, "the queue knows of its end", 90)
    assert is_merged(top)
    assert host.stop() == 0
    said = (host.directory / "worker.err").read_text()
    assert "Traceback" not in said
    assert "the queue does not know yet what became of a job" in said


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
