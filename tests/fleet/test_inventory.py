# SPDX-License-Identifier: Apache-2.0
"""From scans of real hosts by a plan to merges, with real workers, images and database."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from msgspec.structs import replace

from chainmerge.documents.fleet_inventory import HostInventory, InventoryPlace, PlaceKind
from chainmerge.fleet.inventory_store import store
from chainmerge.report.html import BEGINNING
from tests.support.cli import chainmerge
from tests.support.disks_domain import target_of
from tests.support.domain_vm import disk_described, running_domain_with
from tests.support.fleet import are_merged, is_merged, wait_until
from tests.support.libvirtd import libvirtd
from tests.support.qemu import run as run_tool

if TYPE_CHECKING:
    from tests.support.fleet import Fleet, Host


def scanned(fleet: Fleet, *hosts: Host) -> dict[str, Any]:
    """Start workers, and have them scan; returns the inventory by host."""
    for host in hosts:
        host.start()
    wait_until(lambda: len(fleet.ask("SELECT FROM hosts")) == len(hosts), "workers")
    for host in hosts:
        # One after the other: on one machine each sees what the others have open at that moment.
        jobs = fleet.did("scan", host.name)["jobs"]
        assert list(fleet.wait_for_results(jobs).values()) == ["done"]
    return {one["host"]: one for one in fleet.did("inventory")["hosts"]}


def planned(fleet: Fleet, *words: str | Path) -> dict[str, Any]:
    ran = fleet.run("plan", *words)
    assert ran.status == 0, ran.err
    found: dict[str, Any] = json.loads(ran.out)
    return found


def tops(plan: dict[str, Any]) -> list[str]:
    return [job["disks"][0]["top"] for job in plan["jobs"]]


def longer(host: Host, name: str, images: int) -> Path:
    """A chain with so many images; returns its top."""
    top = host.chain(name)
    for number in range(images - 2):
        above = host.images / f"{name}.{number}"
        run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", top, above)
        run_tool("qemu-io", "-c", "write -q -P 4 0 128K", above)
        top = above
    return top


def test_what_is_scanned_is_planned_in_its_order_and_merged(fleet: Fleet) -> None:
    host = fleet.host("h1", connect='""')
    short, long = host.chain("short"), longer(host, "long", 4)
    inventory = scanned(fleet, host)
    assert (inventory["h1"]["chains"], inventory["h1"]["longest"]) == (2, 4)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in host.images.iterdir())
    plan = planned(fleet)
    assert tops(plan) == [str(long), str(short)]
    assert {job["judged_by"] for job in plan["jobs"]} == {"chain"}
    assert plan["jobs"][0]["figures"]["images"] == 4
    after = sorted((path.name, path.stat().st_mtime_ns) for path in host.images.iterdir())
    assert before == after, "nothing is written"
    jobs = fleet.submit(plan)
    assert fleet.submit(plan) == []
    assert set(fleet.wait_for_results(jobs).values()) == {"done"}
    assert is_merged(short)


def test_nothing_is_merged_that_has_changed_since_the_scan(fleet: Fleet) -> None:
    host = fleet.host("h1", connect='""')
    leaf_written, base_written, touched, same = (
        host.chain(name) for name in ("leaf", "base", "times", "same")
    )
    scanned(fleet, host)
    plan = planned(fleet)
    host.write(leaf_written)
    run_tool("qemu-io", "-c", "write -q -P 9 40M 64K", base_written.with_suffix(".base"))
    # A guest that starts has its images change hands, which is no change.
    os.chown(touched, 12345, 12345)
    os.chown(touched, 0, 0)
    jobs = fleet.submit(plan)
    outcomes = fleet.wait_for_results(jobs)
    assert dict(zip(tops(plan), map(outcomes.get, jobs), strict=True)) == {
        str(leaf_written): "plan-changed",
        str(base_written): "plan-changed",
        str(touched): "done",
        str(same): "done",
    }


@pytest.mark.parametrize("written_meanwhile", [False, True], ids=["alone", "written to"])
def test_what_an_interrupted_merge_has_written_is_no_change(
    fleet: Fleet, tmp_path: Path, written_meanwhile: bool
) -> None:
    host = fleet.host("h1", connect='""')
    top = host.chain("disk", 8)
    scanned(fleet, host)
    policy = tmp_path / "policy.toml"
    policy.write_text('bandwidth = { default = "2M" }\n')
    (job,) = fleet.submit(planned(fleet, "--policy", policy))
    wait_until(host.children, "a merge that runs")
    written = top.with_suffix(".base").stat().st_mtime_ns
    wait_until(
        lambda: top.with_suffix(".base").stat().st_mtime_ns != written, "a merge that writes"
    )
    assert host.stop() == 0
    wait_until(lambda: not host.children(), "its end")
    assert job not in fleet.outcomes()
    if written_meanwhile:
        run_tool("qemu-io", "-c", "write -q -P 9 40M 64K", str(top))
    host.start()
    expected = "plan-changed" if written_meanwhile else "done"
    assert fleet.wait_for_results([job]) == {job: expected}
    assert is_merged(top) is not written_meanwhile


def test_a_chain_that_several_hosts_see_is_merged_once(
    fleet: Fleet, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shared = tmp_path_factory.mktemp("shared")
    hosts = [fleet.host(f"h{number}", shared, connect='""') for number in range(3)]
    both = [hosts[0].chain(f"shared{number}", directory=shared) for number in range(3)]
    own = hosts[1].chain("own")
    scanned(fleet, *hosts)
    plan = planned(fleet)
    assert sorted(tops(plan)) == sorted(map(str, [*both, own]))
    assert {job["host"] for job in plan["jobs"]} == {"h0", "h1", "h2"}, "all have their share"
    assert all(
        "storage/nfs" in job["keys"] for job in plan["jobs"] if "shared" in str(job["disks"])
    )
    jobs = fleet.submit(plan)
    assert set(fleet.wait_for_results(jobs).values()) == {"done"}
    assert are_merged([*both, own])


def test_what_a_merge_would_refuse_is_left_out_and_told(fleet: Fleet, tmp_path: Path) -> None:
    host = fleet.host("h1", connect='""', directories=json.dumps([str(tmp_path / "h1" / "images")]))
    outside = tmp_path / "outside"
    outside.mkdir()
    fine = host.chain("fine")
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", outside / "base", "64M")
    foreign = host.images / "foreign"
    overlay = ("-f", "qcow2", "-F", "qcow2", "-b", outside / "base", foreign)
    run_tool("qemu-img", "create", "-q", "-u", *overlay, "64M")
    broken = host.images / "broken"
    broken.write_bytes(b"QFI\xfb" + bytes(100))
    scanned(fleet, host)
    plan = planned(fleet)
    assert tops(plan) == [str(fine)]
    assert {one["leaf"] for one in plan["left_out"]} == {str(foreign), str(broken)}


def test_a_policy_decides(fleet: Fleet, tmp_path: Path) -> None:
    host = fleet.host("h1", connect='""')
    names = ("alpha", "beta", "template")
    alpha, _beta, _template = (longer(host, name, 3) for name in names)
    host.chain("short")
    scanned(fleet, host)
    policy = tmp_path / "policy.toml"
    policy.write_text(
        """
        least_images = 3
        most_jobs = 1
        [merging]
        verify = "metadata"
        delete = true
        [leave_alone]
        images = ["*/template*"]
        [limits]
        "host/h1" = 3
        [bandwidth]
        default = "50M"
        """
    )
    plan = planned(fleet, "--policy", policy)
    assert tops(plan) == [str(alpha)]
    options = plan["jobs"][0]["options"]
    assert options == {"verify": "metadata", "delete": True, "bandwidth": 50 << 20}
    reasons = {Path(one["leaf"]).name: one["code"] for one in plan["left_out"]}
    assert reasons == {
        "beta.0": "most-jobs",
        "template.0": "left-alone",
        "short.top": "short-chain",
    }
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan))
    fleet.did("submit", file)
    (limit,) = (key for key in fleet.did("status")["keys"] if key["key"] == "host/h1")
    assert limit["limit"] == 3
    policy.write_text("leest_images = 3\n")
    ran = fleet.run("plan", "--policy", policy)
    assert ran.status == 2
    assert "did you mean 'least_images'?" in ran.err
    assert fleet.run("plan", "--policy", policy, "--delete").status == 2


def test_a_machine_that_runs_merges_what_its_scan_found(
    fleet: Fleet, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('running = "merge"\n')
    with libvirtd(tmp_path_factory.mktemp("libvirt")) as uri:
        host = fleet.host("h1", connect=json.dumps(uri))
        images = [host.chain(f"disk{number}") for number in range(2)]
        disks = [disk_described(target_of(number), top) for number, top in enumerate(images)]
        with running_domain_with(tmp_path / "vm", uri, disks) as vm:
            scanned(fleet, host)
            assert planned(fleet)["jobs"] == [], "it runs"
            plan = planned(fleet, "--policy", policy)
            (job,) = plan["jobs"]
            assert (job["action"], job["figures"]["vm"]) == ("live-merge", vm.name)
            assert sorted(disk["top"] for disk in job["disks"]) == sorted(map(str, images))
            outcomes = fleet.wait_for_results(fleet.submit(plan))
            assert list(outcomes.values()) == ["done"]
            assert "disk0.base" in vm.domain.XMLDesc()
    assert are_merged(images)


def test_disks_of_a_machine_and_snapshots_that_go(fleet: Fleet, tmp_path: Path) -> None:
    host = fleet.host("h1", connect='""')
    disks, long = [host.chain(name) for name in ("vda", "vdb")], longer(host, "long", 5)
    scanned(fleet, host)
    # As libvirt would have it of a machine that does not run.
    ((document,),) = fleet.ask("SELECT document FROM inventory")
    known = json.loads(document)
    for chain in known["chains"]:
        if chain["leaf"] != str(long):
            chain["domain"] = "vm"
    fleet.execute("UPDATE inventory SET document = %s", json.dumps(known))
    policy = tmp_path / "policy.toml"
    policy.write_text('[retention]\nkeep_last = 1\n[merging]\ndirection = "commit"\n')
    thinning = planned(fleet, "--policy", policy)
    assert [job["action"] for job in thinning["jobs"]] == ["thin-out"]
    policy.write_text('[leave_alone]\nimages = ["*/long*"]\n')
    together = planned(fleet, "--policy", policy)
    assert [len(job["disks"]) for job in together["jobs"]] == [2]
    jobs = fleet.submit(thinning, together)
    assert list(fleet.wait_for_results(jobs).values()) == ["done", "done"]
    assert are_merged(disks)
    chain = json.loads(
        run_tool("qemu-img", "info", "--backing-chain", "--output=json", long).stdout
    )
    assert len(chain) == 2, "its last snapshot stays"


def test_who_thins_out_a_chain_holds_what_a_merge_of_all_of_it_holds(
    fleet: Fleet, tmp_path: Path
) -> None:
    host = fleet.host("h1", connect='""')
    leaf = longer(host, "long", 5)
    scanned(fleet, host)
    policy = tmp_path / "policy.toml"
    policy.write_text("[retention]\nkeep_last = 1\n")
    (merge,), (thinned,) = planned(fleet)["jobs"], planned(fleet, "--policy", policy)["jobs"]
    # So that what is merged first is not the lowest image.
    kept = ("--keep", "long.base", "--keep-last", "1")
    (on_host,) = host.planned("--action", "thin-out", *kept, leaf)["jobs"]
    assert merge["keys"] == thinned["keys"] == on_host["keys"]
    (foreign,) = host.planned("--action", "thin-out", *kept, leaf)["jobs"]
    (other,) = host.planned(host.chain("other"))["jobs"]
    foreign |= {"keys": other["keys"], "disks": [{**other["disks"][0], "top": str(leaf)}]}
    jobs = fleet.submit({"jobs": [foreign, on_host]})
    outcomes = fleet.wait_for_results(jobs)
    assert list(outcomes.values()) == ["plan-changed", "done"], fleet.did("results")


def test_a_scan_waits_for_no_merge_and_is_queued_once(fleet: Fleet) -> None:
    host = fleet.host("h1", connect='""')
    fleet.register(host)
    fleet.did("pause", "host/h1")
    (merge,) = fleet.submit(host.planned(host.chain("disk")))
    (scan,) = fleet.did("scan")["jobs"]
    assert fleet.did("scan")["jobs"] == [], "one that waits is enough"
    (waiting,) = (one for one in fleet.did("status")["jobs"] if one["job"] == scan)
    assert waiting["action"] == "scan"
    assert host.start("--once").wait(60) == 0
    assert fleet.outcomes() == {scan: "done"}
    assert [one["job"] for one in fleet.did("status")["jobs"]] == [merge]
    assert fleet.run("scan", "nobody").status == 2
    host.start()
    ran = fleet.run("scan", "--wait")
    assert ran.status == 0, ran.err
    assert "h1" in ran.out


def test_who_waits_for_scans_hears_which_hosts_cannot_scan(fleet: Fleet) -> None:
    host, down = fleet.host("h1", connect='""'), fleet.host("h2", connect='""')
    fleet.register(host, down)
    host.start()
    fleet.execute("UPDATE hosts SET seen = now() - interval '1 hour' WHERE host = 'h2'")
    for expected in ("a new scan", "one that waited before"):
        ran = fleet.run("scan", "--wait")
        assert ran.status == 5, expected
        assert "not scanned: h2 has not been heard from for 60 minutes" in ran.err
    fleet.did("drain", "h1")
    ran = fleet.run("scan", "--wait", "h1")
    assert ran.status == 5
    assert "h1 is drained" in ran.err
    wait_until(fleet.claimed, "a claim")
    assert fleet.did("scan", "h1")["jobs"] == [], "one that waits is enough, whoever has it in hand"
    fleet.did("undrain", "h1")
    assert fleet.run("scan", "--wait", "h1").status == 0


def test_a_host_says_nothing_for_another_one_and_little(fleet: Fleet) -> None:
    fleet.register(fleet.host("h1"), fleet.host("h2"))
    store = "SELECT chainmerge.store_inventory(%s, %s, %s, 1, 2, 3)"
    with psycopg.connect(fleet.address_of("host-h1"), autocommit=True) as connection:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(store, ("h2", 1, "{}"))
        for statement in ("DELETE FROM chainmerge.inventory", "SELECT * FROM chainmerge.inventory"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement.encode())
        with pytest.raises(psycopg.errors.CheckViolation):
            connection.execute(store, ("h1", 1, "x" * ((16 << 20) + 1)))
        for moment in range(600):
            connection.execute(store, ("h1", moment, '{"host": "h2"}'))
        connection.execute(store, ("h1", 5, "older"))
    assert fleet.ask("SELECT count(*) FROM inventory_points") == [(500,)]
    assert fleet.ask("SELECT scanned_at FROM inventory") == [(599,)]
    summaries = fleet.did("inventory")["hosts"]
    assert [one["scanned_at"] for one in summaries] == [None, None], "what is no inventory is none"
    assert planned(fleet)["jobs"] == []


def test_volumes_that_hosts_share_without_locks_are_not_even_submitted(
    fleet: Fleet, tmp_path: Path
) -> None:
    group = InventoryPlace(PlaceKind.VOLUME_GROUP, "uuid", "vms", "", False, False, 1 << 40)
    plan = tmp_path / "plan.json"
    job = {
        "v": 1,
        "host": "h1",
        "machine_id": "0" * 32,
        "action": "merge",
        "disks": [{"top": "/dev/vms/b", "base": "/dev/vms/a", "base_id": "0" * 32}],
        "keys": ["host/h1", "image/" + "0" * 32],
        "options": {},
        "plan_digest": "0" * 32,
    }
    plan.write_text(json.dumps({"version": 1, "jobs": [job]}))

    def report(name: str, place: InventoryPlace) -> None:
        found = HostInventory(1, name, "0" * 32, 1, 0, 0, 0, (place,), (), 0, 0, ())
        store(fleet.address_of(f"host-{name}"), found)

    fleet.register(fleet.host("h1"), fleet.host("h2"))
    for name in ("h1", "h2"):
        report(name, group)
    ran = fleet.run("submit", plan)
    assert ran.status == 2
    assert "say fleet_only in the configuration of h1, h2" in ran.err
    assert fleet.did("inventory")["shared"][0]["is_refused"]
    report("h1", replace(group, fleet_only=True))
    assert "of h2" in fleet.run("submit", plan).err
    report("h2", replace(group, locks=True))
    assert len(fleet.did("submit", plan)["jobs"]) == 1


def test_a_fleet_without_an_inventory_is_brought_up_to_date(fleet: Fleet) -> None:
    fleet.execute(
        "DROP TABLE inventory, inventory_points;"
        "UPDATE installed SET version = '1' WHERE component = 'fleet'"
    )
    ran = fleet.run("inventory")
    assert ran.status == 3
    assert "fleet init" in ran.err
    fleet.set_up()
    assert fleet.did("inventory")["hosts"] == []


@pytest.mark.parametrize(("component", "version"), [("fleet", "10"), ("queue", "3.11.0")])
def test_a_fleet_of_a_later_version_is_not_brought_back(
    fleet: Fleet, tmp_path: Path, component: str, version: str
) -> None:
    fleet.execute(
        f"UPDATE installed SET version = '{version}' WHERE component = '{component}';"
        "CREATE OR REPLACE FUNCTION full_keys(asked text[]) RETURNS text[]"
        " LANGUAGE sql AS 'SELECT asked /* of that version */'"
    )
    owners = tmp_path / "owner.toml"
    owners.write_text(f"database = {json.dumps(fleet.database)}\n")
    for ran in (fleet.run("status"), chainmerge("fleet", "init", "--config", owners)):
        assert ran.status == 3
        assert "install that version" in ran.err
        assert "run `chainmerge fleet init`" not in ran.err
    ((body,),) = fleet.ask("SELECT prosrc FROM pg_proc WHERE proname = 'full_keys'")
    assert "of that version" in body


def test_hostile_scans_are_rejected(fleet: Fleet) -> None:
    host = fleet.host("h1", connect='""')
    fleet.register(host)
    good = {"v": 1, "host": "h1", "action": "scan", "submitted": {"by": "me", "at": "now"}}
    rows = [
        {"record": {**good, "host": "h2"}},
        {"record": {**good, "v": 2}},
        {"record": {**good, "paths": ["/etc"]}},
        {"record": {"action": "scan"}},
        {"record": good, "more": 1},
    ]
    fleet.queue("h1", *rows, {"record": good})
    assert host.start("--once").wait(60) == 0
    outcomes = [outcome for _, outcome in sorted(fleet.outcomes().items())]
    assert outcomes == [*["rejected"] * len(rows), "done"]


def test_it_is_drawn_watched_and_measured(fleet: Fleet, tmp_path: Path) -> None:
    host = fleet.host("h1", connect='""')
    top = host.chain("<b>bold", 2)
    scanned(fleet, host)
    fleet.register(fleet.host("never"))
    host.stop()
    page, plan_page = tmp_path / "fleet.html", tmp_path / "plan.html"
    plan = planned(fleet, "--html", plan_page)
    fleet.submit(plan)
    host.start()
    lines = fleet.run("watch", "--interval", "0.2", "--until-idle").out.splitlines()
    assert lines[-1].endswith("0 jobs running, 0 waiting")
    assert is_merged(top)
    fleet.did("report", "-o", page)
    for file in (page, plan_page):
        text = file.read_text()
        assert text.startswith(BEGINNING)
        assert "<b>bold" not in text
        assert "&lt;b&gt;bold" in text
    assert "Never scanned" in page.read_text()
    textfile = tmp_path / "fleet.prom"
    assert fleet.run("metrics", "--textfile", textfile).status == 0
    metrics = textfile.read_text()
    assert 'chainmerge_fleet_chains{host="h1"} 1.0' in metrics
    assert 'chainmerge_fleet_results{outcome="done"} 2.0' in metrics
    assert chainmerge("fleet", "look", "--json", "-q", "--config", host.config).json["host"] == "h1"
