# SPDX-License-Identifier: Apache-2.0
"""What jobs do beside a merge of one disk, each as it was planned and not otherwise."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any, Final

import libvirt
import pytest

from chainmerge.fleet.places import keys_on
from chainmerge.fleet.record import RecordUnusable, record_in
from chainmerge.fleet.windows import is_open
from tests.support.cli import chainmerge
from tests.support.damage import leak_clusters
from tests.support.disks_domain import target_of
from tests.support.domain_vm import disk_described, running_domain_with
from tests.support.fleet import are_merged, is_merged, wait_until
from tests.support.fleet_actions import STALE, WorkOfEachAction
from tests.support.libvirtd import libvirtd
from tests.support.qemu import bitmap_names
from tests.support.qemu import run as run_tool

if TYPE_CHECKING:
    from tests.support.fleet import Fleet

SECONDS_LEFT: Final = 25
"""Of a window, when a worker starts: it has to begin within them, and to stop at their end."""


def test_every_action_is_done_as_planned_or_not_at_all(fleet: Fleet) -> None:
    host = fleet.host("h1")
    work = WorkOfEachAction(host)
    work.make()
    outdated = work.planned()
    host.write(work.image("right.top"))
    host.write(work.image("thin.top"))
    run_tool("qemu-img", "bitmap", "--add", str(work.image("pruned.base")), "another")
    leak_clusters(work.image("leaking.top"), 2)
    jobs = fleet.submit(*outdated.values())
    assert host.start("--once").wait(120) == 0
    assert fleet.outcomes() == dict.fromkeys(jobs, "plan-changed")
    assert not is_merged(work.image("left.top"))
    assert set(bitmap_names(work.image("pruned.base"))) == {STALE, "another"}
    assert work.image("thin.base").exists()

    plans = work.planned()
    (together,) = plans["merge"]["jobs"]
    assert len(together["disks"]) == 2
    assert len([key for key in together["keys"] if key.startswith("image/")]) == 4
    fleet.did("forget", "--older", "0d")
    jobs = fleet.submit(*plans.values())
    assert host.start("--once").wait(120) == 0
    assert fleet.outcomes() == dict.fromkeys(jobs, "done"), fleet.did("results")
    work.require_done()
    assert fleet.running() == []

    # As after a database that comes from a backup: what was done is found done.
    fleet.did("forget", "--older", "0d")
    later = fleet.submit(plans["merge"], plans["repair"])
    assert host.start("--once").wait(60) == 0
    assert fleet.outcomes() == dict.fromkeys(later, "already")


def test_disks_that_somebody_merged_make_the_others_no_less_judged(fleet: Fleet) -> None:
    host = fleet.host("h1")
    left, right = host.chain("left"), host.chain("right")
    jobs = fleet.submit(host.planned("--together", "--delete", left, right))
    assert chainmerge("merge", "--delete", left).status == 0
    host.write(right)
    assert host.start("--once").wait(120) == 0
    assert fleet.outcomes() == dict.fromkeys(jobs, "plan-changed")
    assert right.exists()


def test_a_link_that_leads_elsewhere_since_the_job_was_claimed(fleet: Fleet) -> None:
    host = fleet.host("h1")
    inside, outside = host.images / "inside", fleet.directory / "outside"
    for directory in (inside, outside):
        directory.mkdir()
    top = host.chain("disk", directory=inside)
    (job,) = fleet.submit(host.planned("--delete", top))
    assert chainmerge("merge", "--delete", top).status == 0
    fleet.did("pause", "host/h1")
    host.start()
    wait_until(fleet.claimed, "a claim")
    time.sleep(1)
    for image in inside.iterdir():
        image.rename(outside / image.name)
    inside.rmdir()
    inside.symlink_to(outside)
    fleet.did("limit", "host/h1", "1")
    assert fleet.wait_for_results([job]) == {job: "rejected"}


def record_of(action: str, *names: str, **options: Any) -> dict[str, Any]:
    """A record that is in order."""
    disks = [{"top": f"/i/{name}.top", "base": f"/i/{name}.base"} for name in names]
    if action == "repair":
        disks = [{"top": f"/i/{name}.top", "base": f"/i/{name}.top"} for name in names]
    return {
        "v": 1,
        "host": "h1",
        "machine_id": "0" * 32,
        "action": action,
        "options": options,
        "keys": ["host/h1", "image/1"],
        "plan_digest": "0" * 32,
        "priority": 0,
        "submitted": {"by": "me", "at": "now"},
        "disks": [{**disk, "base_id": "0" * 32} for disk in disks],
    }


def test_an_action_has_its_own_options_and_disks() -> None:
    merge, prune = record_of("merge", "left", "right", delete=True), record_of("prune", "a")
    thin_out, repair = record_of("thin-out", "a", keep_last=0), record_of("repair", "a")
    for record in (merge, thin_out, prune, repair):
        record_in({"record": record})
    domain = {"name": "web", "uuid": "0" * 8 + "-0000-0000-0000-" + "0" * 12}
    odd: list[dict[str, Any]] = [
        {**prune, "options": {"delete": True}},
        {**prune, "options": {"drop_bitmaps": True}},
        {**repair, "options": {"reclaim": True}},
        {**repair, "options": {"verify": "metadata"}},
        {**thin_out, "options": {}},
        {**thin_out, "options": {"keep_checkpoints": True}},
        {**thin_out, "options": {"keep": ["a\nb"]}},
        {**thin_out, "options": {"keep_last": -1}},
        {**thin_out, "options": {"keep_last": 1, "drop_snapshots": True}},
        {**merge, "options": {"keep_last": 1}},
        {**merge, "options": {"on_stall": "abort"}},
        {**merge, "domain": domain},
        {**merge, "action": "live-merge"},
        {**merge, "action": "repair"},
        {**repair, "disks": merge["disks"][:1]},
        {**merge, "windows": ["22:00-24:00"]},
        {**merge, "windows": "22:00-05:00"},
        {**merge, "window_end": "kill"},
        {**merge, "disks": []},
    ]
    odd += [{**one, "disks": merge["disks"]} for one in (thin_out, prune, repair)]
    live = copy.deepcopy({**merge, "action": "live-merge", "domain": domain})
    for disk, target in zip(live["disks"], ("vda", "vdb"), strict=True):
        disk["target"] = target
    assert record_in({"record": live}).domain is not None
    odd += [
        {**live, "domain": {**domain, "name": "-c"}},
        {**live, "domain": {**domain, "uuid": "web"}},
        {**live, "domain": {**domain, "uri": "qemu+ssh://elsewhere/system"}},
        {**live, "options": {"drop_bitmaps": True}},
        {**live, "options": {"engine": "native"}},
        {**live, "disks": [*live["disks"][:1], *merge["disks"][1:]]},
    ]
    for record in odd:
        with pytest.raises(RecordUnusable):
            record_in({"record": record})
    followed = keys_on("h9", record_in({"record": live}))
    assert "host/h9" in followed
    assert "host/h1" not in followed


@pytest.mark.parametrize(
    ("windows", "clock", "opened"),
    [
        ([], "12:00", True),
        (["22:00-05:00"], "21:59", False),
        (["22:00-05:00"], "22:00", True),
        (["22:00-05:00"], "00:00", True),
        (["22:00-05:00"], "04:59", True),
        (["22:00-05:00"], "05:00", False),
        (["12:00-13:00", "01:00-02:00"], "01:30", True),
        (["12:00-13:00", "01:00-02:00"], "02:00", False),
        (["00:00-00:00"], "17:00", True),
    ],
)
def test_windows_go_by_the_clock(windows: list[str], clock: str, opened: bool) -> None:
    assert is_open(windows, time.strptime(clock, "%H:%M")) is opened


@pytest.mark.parametrize(
    ("utc", "opened"),
    [
        # Clocks in Berlin go from 2 to 3 o'clock at 01:00 UTC, and from 3 to 2 likewise.
        ("2027-03-28 00:59", False),
        ("2027-03-28 01:00", True),
        ("2027-03-28 01:59", True),
        ("2027-03-28 02:00", False),
        ("2027-10-31 00:59", False),
        ("2027-10-31 01:59", False),
        ("2027-10-31 02:00", True),
    ],
)
def test_windows_where_the_clock_is_changed(
    utc: str, opened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    try:
        moment = time.mktime(time.strptime(utc, "%Y-%m-%d %H:%M"))
        monkeypatch.setenv("TZ", "Europe/Berlin")
        time.tzset()
        assert is_open(["03:00-04:00"], time.localtime(moment)) is opened
    finally:
        monkeypatch.undo()
        time.tzset()


def clock(minutes_from_now: int) -> str:
    return time.strftime("%H:%M", time.localtime(time.time() + 60 * minutes_from_now))


def test_jobs_keep_to_their_windows(fleet: Fleet) -> None:
    host = fleet.host("h1")
    inside, outside = f"{clock(-60)}-{clock(60)}", f"{clock(60)}-{clock(120)}"
    slow = ("--bandwidth", "512K")
    now = host.planned("--window", outside, "--window", inside, host.chain("now"))
    later = host.planned("--window", outside, "--priority", "10", host.chain("later"))
    (done,) = fleet.submit(now)
    (waiting,) = fleet.submit(later)
    assert host.start("--once").wait(60) == 0
    assert fleet.outcomes() == {done: "done"}
    (waits,) = fleet.did("status")["jobs"]
    assert waits["job"] == waiting
    assert waits["waits_for"] == [f"its window {outside}, by the clock of h1"]

    # In a zone of its own, the host's clock shows that a minute ends in so many seconds.
    start = int(time.time())
    shift = 60 - SECONDS_LEFT - start % 60
    # POSIX counts from the clock to UTC.
    zone_of_host = f"CLK{'-' if shift > 0 else '+'}0:0:{abs(shift)}"
    end = time.strftime("%H:%M", time.gmtime(start + shift + SECONDS_LEFT))
    short = f"{time.strftime('%H:%M', time.gmtime(start + shift - 3600))}-{end}"
    plan = host.planned(*slow, "--window", short, "--window-end", "stop", host.chain("long", 40))
    (stopped,) = fleet.submit(plan)
    fleet.did("cancel", str(waiting))
    host.start(TZ=zone_of_host)
    wait_until(host.children, "a merge that runs in its window")
    wait_until(lambda: not host.children(), "its end, with the window", SECONDS_LEFT)
    wait_until(lambda: not fleet.running(), "free keys")
    assert stopped not in fleet.outcomes()
    assert not is_merged(host.images / "long.top")


def test_a_job_whose_files_cannot_be_written_fails(fleet: Fleet) -> None:
    host = fleet.host("h1")
    top = host.chain("a")
    (job,) = fleet.submit(host.planned(top))
    ((label,),) = fleet.ask("SELECT queueing_lock FROM procrastinate_jobs")
    obstacle = host.state / f"{job}-{label[:8]}.jsonl"
    obstacle.mkdir(parents=True)
    assert host.start("--once").wait(60) == 0
    (failed,) = fleet.did("results")["results"]
    assert failed["outcome"] == "failed"
    assert str(obstacle) in failed["message"]
    assert fleet.running() == []
    obstacle.rmdir()
    fleet.did("retry", str(job))
    assert host.start("--once").wait(60) == 0
    assert fleet.outcomes() == {job: "done"}


def test_a_job_follows_its_domain(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> None:
    shared = tmp_path_factory.mktemp("shared")
    places = [tmp_path_factory.mktemp(f"libvirt{number}") for number in range(2)]
    with libvirtd(places[0]) as here, libvirtd(places[1]) as there:
        first = fleet.host("h1", shared, connect=f'"{here}"')
        second = fleet.host("h2", shared, connect=f'"{there}"')
        third = fleet.host("h3", shared, connect='""')
        tops = [second.chain(f"disk{number}", directory=shared) for number in range(2)]
        disks = [disk_described(target_of(number), top) for number, top in enumerate(tops)]
        with running_domain_with(shared / "vm", here, disks) as vm:
            plan = first.planned("--domain", vm.name)
            described = vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        job, gone = fleet.submit(plan, first.planned(first.chain("cold")))
        # It runs nowhere now: that is found out, and the job says so.
        first.start()
        for host in (second, third):
            host.start()
        assert fleet.wait_for_results([job, gone]) == {job: "refused", gone: "done"}
        (refused,) = fleet.did("results", str(job))["results"]
        assert refused["error_code"] == "vm-no-such-domain"
        connection = libvirt.open(there)
        domain = connection.createXML(described)
        try:
            fleet.did("retry", str(job))
            assert fleet.wait_for_results([job]) == {job: "done"}
            assert "disk0.base" in domain.XMLDesc()
            assert "disk0.top" not in domain.XMLDesc()
        finally:
            domain.destroy()
            connection.close()
    (done,) = fleet.did("results", str(job))["results"]
    assert done["host"] == "h2"
    assert fleet.running() == []
    assert fleet.ask("SELECT FROM sought") == []
    assert are_merged(tops)
