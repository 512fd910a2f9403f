# SPDX-License-Identifier: Apache-2.0
"""What a run of a job leaves in the database concerns no later run, and nobody else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from tests.support.fleet import wait_until

if TYPE_CHECKING:
    from tests.support.fleet import Fleet, Host

NOWHERE: Final = {"name": "web", "uuid": "0" * 8 + "-0000-0000-0000-" + "0" * 12}


def live_plan(host: Host, name: str) -> dict[str, Any]:
    """A plan to merge live in a domain that no host runs."""
    plan = host.planned(host.chain(name))
    (job,) = plan["jobs"]
    job |= {"action": "live-merge", "domain": NOWHERE}
    job["disks"][0]["target"] = "vda"
    return plan


def killed_while_it_seeks(fleet: Fleet, host: Host, plan: dict[str, Any]) -> int:
    (job,) = fleet.submit(plan)
    host.start()
    wait_until(lambda: fleet.ask("SELECT FROM sought"), "a domain that is sought")
    host.kill()
    return job


def test_nobody_looks_for_the_domain_of_a_job_that_was_cancelled(fleet: Fleet) -> None:
    host = fleet.host("h1", connect='""')
    job = killed_while_it_seeks(fleet, host, live_plan(host, "a"))
    fleet.did("cancel", str(job))
    host.start()
    assert fleet.wait_for_results([job]) == {job: "cancelled"}
    # What the worker says next, it says after all of that.
    (later,) = fleet.submit(host.planned(host.chain("b")))
    assert fleet.wait_for_results([later]) == {later: "done"}
    assert fleet.ask("SELECT * FROM sought") == []


def test_nobody_looks_for_the_domain_of_a_job_whose_host_is_gone(fleet: Fleet) -> None:
    host = fleet.host("h1", connect='""')
    job = killed_while_it_seeks(fleet, host, live_plan(host, "a"))
    wait_until(lambda: fleet.run("release", "h1", "--fenced").status == 0, "its release")
    fleet.did("cancel", str(job))
    assert fleet.outcomes() == {job: "cancelled"}
    assert fleet.ask("SELECT * FROM sought") == []


def test_a_wish_that_crossed_the_end_of_a_job_does_not_end_its_next_run(fleet: Fleet) -> None:
    host = fleet.host("h1", connect='""')
    top = host.chain("a")
    before, plan = top.read_bytes(), host.planned(top)
    host.write(top)
    (job,) = fleet.submit(plan)
    assert host.start("--once").wait(60) == 0
    assert fleet.outcomes() == {job: "plan-changed"}
    # As where the job has ended after `cancel` had found it running.
    fleet.execute(f"INSERT INTO wishes VALUES ({job})")
    top.write_bytes(before)
    fleet.did("retry", str(job))
    assert host.start("--once").wait(60) == 0
    assert fleet.outcomes() == {job: "done"}
