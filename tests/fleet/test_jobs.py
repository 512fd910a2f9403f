# SPDX-License-Identifier: Apache-2.0
"""Jobs from their submission to their end, with real workers, merges and database."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psycopg
import pytest

from chainmerge.fleet.places import base_id_of
from chainmerge.fleet.record import image_key
from tests.support.cli import chainmerge
from tests.support.fleet import are_merged, is_merged, wait_until
from tests.support.fleet_actions import overlay_on
from tests.support.qemu import run as run_tool

if TYPE_CHECKING:
    from tests.support.fleet import Fleet, Host

SLOW: Final = ("--bandwidth", "512K")
"""A merge of a few MiB that takes seconds: long enough for what happens meanwhile."""


def slow_merge_that_runs(fleet: Fleet, host: Host) -> int:
    """Submit a merge that takes long; return its number once it copies."""
    (job,) = fleet.submit(host.planned(*SLOW, host.chain("slow", 4)))
    host.start()
    wait_until(host.children, "a merge that runs")
    wait_until(lambda: copies(fleet, job), "a merge that copies")
    return job


def copies(fleet: Fleet, job: int) -> bool:
    return any(
        json.loads(line).get("stage") == "copy"
        for (line,) in fleet.ask("SELECT line FROM progress WHERE job = %s AND line <> ''", job)
    )


def state_of(process: int) -> str:
    """The state of a process, as proc(5) has it in ``stat``."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def watch_peaks(fleet: Fleet) -> None:
    """Have the database note how many hold each key, whenever one is taken."""
    fleet.execute(
        "CREATE TABLE peaks (key text, held bigint);"
        "CREATE FUNCTION note_peak() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN"
        " INSERT INTO chainmerge.peaks SELECT NEW.key, count(*) FROM chainmerge.leases"
        " WHERE key = NEW.key; RETURN NULL; END $$;"
        "CREATE TRIGGER peak AFTER INSERT ON leases FOR EACH ROW EXECUTE FUNCTION note_peak();"
    )


def peaks(fleet: Fleet) -> dict[str, int]:
    return dict(fleet.ask("SELECT key, max(held) FROM peaks GROUP BY key"))


def test_submitted_twice_and_done_once_by_priority(fleet: Fleet) -> None:
    host = fleet.host("h1")
    tops = [host.chain(f"disk{number}") for number in range(3)]
    priorities = (0, -5, 10)
    plans = [
        host.planned("--priority", str(priority), top)
        for top, priority in zip(tops, priorities, strict=True)
    ]
    jobs = fleet.submit(*plans)
    assert len(jobs) == 3
    assert fleet.submit(*plans) == []
    waiting = fleet.did("status")["jobs"]
    assert {one["state"] for one in waiting} == {"waiting"}
    assert host.start("--once").wait(60) == 0
    assert fleet.outcomes() == dict.fromkeys(jobs, "done")
    order = [job for (job,) in fleet.ask("SELECT job FROM results ORDER BY id")]
    assert order == [jobs[2], jobs[0], jobs[1]]
    assert are_merged(tops)
    assert fleet.did("status")["jobs"] == []
    assert fleet.submit(*plans) == [], "what is done is not done again"
    assert not list(host.state.glob("*.jsonl"))
    assert fleet.did("forget", "--older", "0d")["jobs"] == jobs
    assert fleet.ask("SELECT FROM procrastinate_jobs") == []


def test_limits_hold_on_three_hosts_and_a_host_that_is_down_takes_no_slot(
    fleet: Fleet, tmp_path_factory: pytest.TempPathFactory
) -> None:
    watch_peaks(fleet)
    shared = tmp_path_factory.mktemp("shared")
    hosts = [fleet.host(f"h{number}", shared) for number in range(3)]
    down = fleet.host("down", shared)
    fleet.did("limit", "storage/nfs", "2")
    fleet.did("limit", "host/h0", "3")
    tops = {
        host.name: [host.chain(f"{host.name}-{n}", directory=shared) for n in range(2)]
        for host in (*hosts, down)
    }
    local = [hosts[0].chain(f"local{number}") for number in range(3)]
    fleet.submit(down.planned(*tops["down"]))
    plans = [host.planned(*tops[host.name]) for host in hosts]
    jobs = fleet.submit(*plans, hosts[0].planned(*local))
    for host in hosts:
        host.start()
    assert set(fleet.wait_for_results(jobs, 120).values()) == {"done"}
    assert peaks(fleet)["storage/nfs"] == 2
    assert peaks(fleet)["host/h0"] in {2, 3}
    assert peaks(fleet)["host/h1"] == 1
    assert "host/down" not in peaks(fleet)
    (waits,) = {tuple(one["waits_for"]) for one in fleet.did("status")["jobs"]}
    assert waits == ("the worker of down, which has never started",)


def test_pause_cancel_and_retry(fleet: Fleet) -> None:
    host = fleet.host("h1")
    fleet.did("pause", "fleet")
    top, other = host.chain("a"), host.chain("b")
    plans = [host.planned(top), host.planned(other)]
    (early,) = fleet.submit(plans[0])
    fleet.did("cancel", str(early))
    assert "submit it again" in fleet.run("retry", str(early)).err
    first, second = fleet.submit(*plans)
    host.start()
    wait_until(lambda: len(fleet.claimed()) == 2, "a worker that has both in hand")
    reasons = fleet.did("status")["jobs"][0]["waits_for"]
    assert reasons == ["fleet (paused)"]
    assert fleet.running() == []
    fleet.did("cancel", str(first))
    assert fleet.wait_for_results([first]) == {first: "cancelled"}
    fleet.did("limit", "fleet", "5")
    assert fleet.wait_for_results([second]) == {second: "done"}
    assert not is_merged(top)
    assert is_merged(other)
    for unwilling in (first, second):
        ran = fleet.run("cancel", str(unwilling))
        assert ran.status == 2
        assert "it has ended" in ran.err
    assert fleet.run("retry", str(second)).status == 2
    fleet.did("retry", str(first))
    assert fleet.wait_for_results([first]) == {first: "done"}
    assert is_merged(top)


def test_one_merge_is_stopped_in_every_way(fleet: Fleet) -> None:
    host = fleet.host("h1")
    job = slow_merge_that_runs(fleet, host)

    fleet.did("drain", "h1", "--now")
    wait_until(lambda: not fleet.running(), "keys that are free")
    assert host.children() == []
    (waiting,) = fleet.did("status")["jobs"]
    assert waiting["waits_for"] == ["host/h1 (drained)"]
    fleet.did("undrain", "h1")

    wait_until(host.children, "a merge that goes on")
    assert host.stop() == 0
    assert host.children() == []
    assert fleet.running() == []
    assert fleet.ask("SELECT status::text FROM procrastinate_jobs") == [("todo",)]

    host.start()
    (child,) = wait_until(host.children, "a merge that goes on")
    os.kill(child, signal.SIGSTOP)
    wait_until(lambda: state_of(child) == "T", "a child that neither goes on nor ends")
    host.kill()
    assert fleet.running() == [job], "the host may still write"
    host.start()
    wait_until(lambda: fleet.ask("SELECT FROM hosts WHERE seen > now() - '1 s'::interval"), "it")
    assert host.children() == [child], "no second one beside it"
    os.kill(child, signal.SIGCONT)
    wait_until(lambda: child not in host.children(), "the end of a child without its worker")

    (child,) = wait_until(host.children, "a merge that goes on")
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: set(host.children()) - {child}, "a merge that goes on")

    fleet.did("cancel", str(job))
    assert fleet.wait_for_results([job]) == {job: "cancelled"}
    assert fleet.running() == []
    assert host.children() == []
    assert not is_merged(host.images / "slow.top")
    fleet.did("retry", str(job))
    assert fleet.wait_for_results([job]) == {job: "done"}
    assert fleet.running() == []
    assert is_merged(host.images / "slow.top")


def test_a_database_that_dies_stops_no_merge(fleet: Fleet) -> None:
    host = fleet.host("h1")
    job = slow_merge_that_runs(fleet, host)
    children = host.children()
    fleet.cluster.stop("immediate")
    try:
        wait_until(lambda: not host.children(), "the end of the merge")
        assert is_merged(host.images / "slow.top")
        assert host.worker is not None
        assert host.worker.poll() is None
        ran = fleet.run("status")
        assert ran.status == 1
        assert "the database of the fleet" in ran.err
    finally:
        fleet.cluster.start()
    assert len(children) == 1
    assert fleet.wait_for_results([job]) == {job: "done"}
    (later,) = fleet.submit(host.planned(host.chain("later")))
    assert fleet.wait_for_results([later]) == {later: "done"}


def test_a_worker_without_a_database_says_why_once(fleet: Fleet) -> None:
    host = fleet.host("h1", connect='""', database=json.dumps(fleet.address_of("no-such-login")))
    said = host.directory / "worker.err"
    host.start()
    wait_until(lambda: said.exists() and said.read_text(), "a word")
    time.sleep(3)
    host.stop()
    (line,) = said.read_text().splitlines()
    assert "no-such-login" in line


def test_only_a_dead_host_is_released(fleet: Fleet) -> None:
    host = fleet.host("h1")
    job = slow_merge_that_runs(fleet, host)
    assert fleet.run("release", "h1").status == 2
    assert fleet.run("release", "h1", "--fenced").status == 3
    host.kill()
    wait_until(lambda: fleet.run("release", "h1", "--fenced").status == 0, "a released host")
    assert fleet.outcomes() == {job: "lost"}
    assert fleet.running() == []
    host.start()
    wait_until(lambda: not host.children(), "the end of the child")
    fleet.did("undrain", "h1")
    fleet.did("retry", str(job))
    assert fleet.wait_for_results([job]) == {job: "done"}
    assert is_merged(host.images / "slow.top")


def test_what_waited_on_a_dead_host_is_cancelled_and_two_alike_do_not_wait(fleet: Fleet) -> None:
    host = fleet.host("h1")
    fleet.did("pause", "host/h1")
    top = host.chain("disk")
    plan = host.planned(top)
    (job,) = fleet.submit(plan)
    host.start()
    wait_until(fleet.claimed, "a claim")
    host.kill()
    wait_until(lambda: fleet.run("release", "h1", "--fenced").status == 0, "a released host")
    fleet.did("cancel", str(job), str(job))
    assert fleet.outcomes() == {job: "cancelled"}
    (again,) = fleet.submit(plan)
    ran = fleet.run("retry", str(job))
    assert ran.status == 2
    assert "the same was submitted again, and waits" in ran.err
    fleet.did("undrain", "h1")
    fleet.did("limit", "host/h1", "1")
    host.start()
    assert fleet.wait_for_results([again]) == {again: "done"}
    assert fleet.outcomes() == {job: "cancelled", again: "done"}, "the host heard of it"


def test_what_runs_without_its_keys_is_stopped_and_takes_them_anew(fleet: Fleet) -> None:
    host = fleet.host("h1")
    job = slow_merge_that_runs(fleet, host)
    fleet.did("pause", "host/h1")
    # As of a host that was cut off from the database, released, and whose job was retried.
    fleet.execute("DELETE FROM leases")
    wait_until(lambda: not host.children(), "the end of the child", 5)
    assert fleet.running() == []
    fleet.did("limit", "host/h1", "1")
    assert fleet.wait_for_results([job]) == {job: "done"}
    assert is_merged(host.images / "slow.top")


def test_a_plan_that_has_changed_and_a_merge_that_is_refused(fleet: Fleet) -> None:
    host = fleet.host("h1")
    changed, refused = host.chain("changed"), host.chain("refused")
    plan = host.planned(changed, refused)
    chainmerge("merge", refused)
    host.write(changed)
    refused.with_suffix(".base").unlink()
    jobs = fleet.submit(plan)
    assert host.start("--once").wait(60) == 0
    assert fleet.outcomes() == dict(zip(jobs, ("plan-changed", "refused"), strict=True))
    assert not is_merged(changed)
    (reported,) = fleet.did("results", "--outcome", "refused")["results"]
    assert reported["exit_code"] == 3
    assert json.loads(reported["report"])["code"] == reported["error_code"]


def test_a_name_is_taken_once(fleet: Fleet) -> None:
    host = fleet.host("h1")
    host.start()
    wait_until(lambda: fleet.ask("SELECT FROM hosts"), "a worker")

    def refused_with(**settings: str) -> str:
        other = fleet.host("h1", None, **settings)
        ran = chainmerge("fleet", "worker", "--config", other.config)
        assert ran.status == 3
        return ran.err

    elsewhere = json.dumps(str(host.directory / "other-state"))
    clone = host.directory / "other-machine-id"
    clone.write_text("other\n")
    machine = json.dumps(str(clone))
    assert "on this machine already" in refused_with()
    assert "is connected" in refused_with(state=elsewhere)
    host.stop()
    assert "another machine" in refused_with(state=elsewhere, machine_id_file=machine)


def test_hostile_rows_are_rejected_and_nothing_is_run(fleet: Fleet) -> None:
    host = fleet.host("h1")
    top = host.chain("victim")
    plan = host.planned(top)
    outside = fleet.directory / "outside"
    outside.mkdir()
    foreign = host.chain("foreign", directory=outside)
    link = host.images / "link.top"
    link.symlink_to(foreign)
    good = {**plan["jobs"][0], "submitted": {"by": "me", "at": "now"}}

    def with_disk(**fields: Any) -> dict[str, Any]:
        return {**good, "disks": [{**good["disks"][0], **fields}]}

    rows: list[Any] = [
        with_disk(top=str(foreign)),
        with_disk(top=str(link)),
        with_disk(top=f"{host.images}/../images/victim.top"),
        with_disk(top="relative.top"),
        with_disk(base="/dev/vg0/root"),
        with_disk(base="--lock-command=reboot"),
        with_disk(more=1),
        {**good, "host": "h2"},
        {**good, "machine_id": "0" * 32},
        {**good, "action": "reboot"},
        {**good, "v": 2},
        {**good, "options": {"lock_command": "reboot"}},
        {**good, "options": {"key_files": {"*": "/etc/shadow"}}},
        {**good, "options": {"delete": "yes"}},
        {**good, "argv": ["reboot"]},
        {**good, "keys": []},
        {**good, "keys": [*good["keys"], "host/h2"]},
        {**good, "keys": ["host/h1", "image/" + "0" * 32]},
        {**good, "priority": 1e9},
        {**good, "submitted": {"by": "x" * (1 << 20), "at": ""}},
        "record",
        17,
        None,
        [],
    ]
    fleet.queue("h1", *({"record": row} for row in rows), {"record": good, "more": 1}, {})
    host.start("--once").wait(60)
    outcomes = fleet.outcomes()
    assert set(outcomes.values()) == {"rejected"}
    assert len(outcomes) == len(rows) + 2
    assert not is_merged(top)
    # What is no object at all, and what is for another program, does not get so far.
    with pytest.raises(psycopg.errors.CheckViolation):
        fleet.queue("h1", [1, 2])
    with pytest.raises(psycopg.errors.CheckViolation):
        fleet.execute(
            "INSERT INTO procrastinate_jobs (queue_name, task_name, args)"
            " VALUES ('host.h1', 'os.system', '{}')"
        )
    (last,) = fleet.submit(plan)
    host.start("--once").wait(60)
    assert fleet.outcomes()[last] == "done", "the worker goes on after whatever it has met"


def chain_of_three(host: Host, directory: Path) -> list[Path]:
    """A chain of three images, from the root up."""
    top = host.chain("three", 4, directory)
    leaf = top.with_suffix(".leaf")
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(top), str(leaf))
    run_tool("qemu-io", "-c", "write -q -P 3 8M 2M", str(leaf))
    return [top.with_suffix(".base"), top, leaf]


def image_keys(plan: dict[str, Any]) -> set[str]:
    return {key for job in plan["jobs"] for key in job["keys"] if key.startswith("image/")}


def test_jobs_of_one_chain_do_not_run_at_the_same_time(
    fleet: Fleet, tmp_path_factory: pytest.TempPathFactory
) -> None:
    watch_peaks(fleet)
    shared = tmp_path_factory.mktemp("shared")
    hosts = [fleet.host(name, shared, connect='""') for name in ("h1", "h2")]
    fleet.did("limit", "storage/nfs", "2")
    _, top, leaf = chain_of_three(hosts[0], shared)
    content = shared / "content"
    run_tool("qemu-img", "convert", "-O", "raw", str(leaf), str(content))
    # What one of them copies from, the other one writes to.
    plans = [hosts[0].planned(*SLOW, top), hosts[1].planned(*SLOW, leaf)]
    both = image_keys(plans[0]) & image_keys(plans[1])
    assert both
    jobs = fleet.submit(*plans)
    for host in hosts:
        host.start()
    outcomes = fleet.wait_for_results(jobs)
    assert sorted(outcomes.values()) == ["done", "plan-changed"]
    assert {peaks(fleet)[key] for key in both} == {1}
    run_tool("qemu-img", "compare", "-q", "-U", str(content), str(leaf))


def test_jobs_of_one_chain_keep_apart_however_far_from_each_other(
    fleet: Fleet, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shared = tmp_path_factory.mktemp("shared")
    hosts = [fleet.host(name, shared, connect='""') for name in ("h1", "h2")]
    base, top, leaf = chain_of_three(hosts[0], shared)
    higher = overlay_on(leaf, shared / "higher")
    highest = overlay_on(higher, shared / "highest")
    # The one reads, below what it merges, what the other one writes to or removes.
    low = image_keys(hosts[0].planned("--delete", top))
    high = image_keys(hosts[1].planned(highest))
    assert low & high
    thin_out = ("--action", "thin-out", "--keep", "higher", "--keep", leaf.name, highest)
    assert image_keys(hosts[1].planned(*thin_out)) >= low | high
    # What others use as well is nobody's: else all that stands on a template would wait.
    overlay_on(base, shared / "sibling")
    high = image_keys(hosts[1].planned(highest))
    assert len(high) == 4
    assert image_key(base_id_of(str(base))) not in high


def test_what_would_change_images_that_it_does_not_hold_is_not_run(fleet: Fleet) -> None:
    host = fleet.host("h1", connect='""')
    top = host.chain("disk")
    before = top.read_bytes()
    plan = host.planned(top)
    (job,) = plan["jobs"]
    (disk,) = job["disks"]
    disk["image_ids"] = []
    job["keys"] = ["host/h1", f"image/{disk['base_id']}"]
    jobs = fleet.submit(plan)
    assert host.start("--once").wait(60) == 0
    assert fleet.outcomes() == dict.fromkeys(jobs, "plan-changed")
    assert top.read_bytes() == before


def test_the_same_is_asked_for_again_of_images_that_have_changed(fleet: Fleet) -> None:
    host = fleet.host("h1", connect='""')
    top = host.chain("disk")
    overlay = ["-f", "qcow2", "-F", "qcow2", "-b", str(top.with_suffix(".base")), str(top)]
    # A snapshot each day in the same file, of which a merge does what the last one did.
    for day in range(3, 6):
        run_tool("qemu-img", "create", "-q", *overlay)
        run_tool("qemu-io", "-c", f"write -q -P {day} 512K 1M", str(top))
        plan = host.planned(top)
        (job,) = fleet.submit(plan)
        assert fleet.submit(plan) == []
        assert host.start("--once").wait(60) == 0
        assert fleet.outcomes()[job] == "done"
        assert fleet.submit(plan) == []
        assert is_merged(top)
