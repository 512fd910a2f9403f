# SPDX-License-Identifier: Apache-2.0
"""Plans from an inventory, and what several hosts share: pure, so on made-up hosts."""

from __future__ import annotations

from typing import Any, Final

import msgspec
import pytest
from msgspec.structs import replace

from chainmerge.documents.fleet_inventory import (
    HostInventory,
    InventoryChain,
    InventoryPlace,
    PlaceKind,
)
from chainmerge.documents.fleet_policy import FleetPolicy, PolicyMerging, PolicyRetention
from chainmerge.documents.plan import Finding
from chainmerge.documents.trends import TrendPoint
from chainmerge.fleet.errors import FleetPolicyUnusable
from chainmerge.fleet.inventory_store import StoredInventory, _read, added_up, overview_of
from chainmerge.fleet.operating import plan_in
from chainmerge.fleet.policy import policy_in
from chainmerge.fleet.proposing import job_options_of, propose, view_of
from chainmerge.fleet.record import (
    FleetPlan,
    JobOptions,
    JobRecord,
    Submission,
    read_again,
    record_in,
)
from chainmerge.fleet.sharing import shared_places
from chainmerge.report.fleet_plan_tables import fleet_plan_report, inventory_report
from chainmerge.report.json import encode
from chainmerge.report.plain import plain_text

NOW: Final = 1_800_000_000
GROUP: Final = InventoryPlace(PlaceKind.VOLUME_GROUP, "uuid", "vg", "", False, False, 1 << 40)
FILES: Final = InventoryPlace(PlaceKind.FILE_SYSTEM, "nfs4 s:/x", "/nfs", "nfs", True, False, 9)


def chain(name: str, **fields: Any) -> InventoryChain:
    usual = InventoryChain(
        leaf=f"/images/{name}",
        base=f"/images/{name}.base",
        base_id=f"{abs(hash(name)):032x}"[:32],
        image_ids=(f"{abs(hash(name)):032x}"[:32],),
        digest="d" * 32,
        images=3,
        virtual_size=1 << 30,
        occupied_bytes=1 << 20,
        freed_bytes=1 << 20,
        bytes_to_copy=1 << 20,
        stale_bytes=0,
        free_bytes=1 << 30,
        storages=(),
        places=(),
        unfinished=False,
        in_use=False,
        domain=None,
        target=None,
        domain_uuid=None,
        problem=None,
        refusals=(),
    )
    return replace(usual, **fields)


UUID: Final = "11111111-2222-3333-4444-555555555555"


def host(name: str, *chains: InventoryChain, places: tuple[InventoryPlace, ...] = ()) -> Any:
    return HostInventory(1, name, "0" * 32, NOW - 60, 9, 0, 0, places, chains, 0, 0, ())


def proposed(*hosts: HostInventory, policy: FleetPolicy | None = None) -> FleetPlan:
    stored = StoredInventory(hosts, ())
    return propose(stored, policy or FleetPolicy(), JobOptions(), 0, NOW)


def leaves(plan: FleetPlan) -> list[str]:
    return [job.disks[0].top.removeprefix("/images/") for job in plan.jobs]


def test_long_chains_come_first_then_what_frees_much_then_full_storages() -> None:
    plan = proposed(
        host(
            "h1",
            chain("roomy"),
            chain("full", free_bytes=1),
            chain("frees", freed_bytes=2 << 20),
            chain("long", images=9, freed_bytes=0),
        )
    )
    assert leaves(plan) == ["long", "frees", "full", "roomy"]


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"base": None}, "nothing-to-merge"),
        ({"freed_bytes": None, "problem": "bad"}, "unreadable"),
        ({"unfinished": True}, "unfinished-merge"),
        ({"in_use": True}, "in-use"),
        ({"digest": None}, "unreadable"),
        ({"refusals": (Finding("base-newer", "it is", "do"),)}, "base-newer"),
    ],
)
def test_what_cannot_be_merged_is_left_out(fields: dict[str, Any], code: str) -> None:
    plan = proposed(host("h1", chain("a", **fields), chain("b")))
    assert leaves(plan) == ["b"]
    assert [(one.leaf, one.code) for one in plan.left_out] == [("/images/a", code)]


def test_a_host_that_was_released_gets_no_jobs_but_its_word_still_counts() -> None:
    hosts = [host(name, chain(name, places=("vg",)), places=(GROUP,)) for name in ("h1", "h2")]
    stored = StoredInventory(tuple(hosts), (), ("h2",))
    plan = propose(stored, FleetPolicy(), JobOptions(), 0, NOW)
    assert [one.code for one in plan.left_out] == ["shared-volume-group", "host-released"]


def test_what_another_host_has_open_is_nobodys_to_merge() -> None:
    plan = proposed(host("h1", chain("a")), host("h2", chain("a", in_use=True)))
    assert leaves(plan) == []
    assert {one.code for one in plan.left_out} == {"in-use"}


def test_the_host_that_knows_the_machine_merges_what_all_see() -> None:
    seen = (host("h1", chain("a")), host("h2", chain("a", domain="vm")), host("h3", chain("a")))
    (job,) = proposed(*seen).jobs
    assert (job.host, job.figures and job.figures.vm) == ("h2", "vm")


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        (({}, {}), True),
        (({"locks": True}, {"locks": True}), False),
        (({"locks": True}, {}), True),
        (({"fleet_only": True}, {"fleet_only": True}), False),
        (({"fleet_only": True}, {}), True),
        (({"fleet_only": True}, {"locks": True}), False),
        (({"id": "another"}, {}), False),
    ],
)
def test_a_group_of_several_hosts_needs_locks_or_a_word(
    changes: tuple[dict[str, Any], dict[str, Any]], refused: bool
) -> None:
    hosts = [
        host(name, chain(name, places=("vg",)), places=(replace(GROUP, **change),))
        for name, change in zip(("h1", "h2"), changes, strict=True)
    ]
    plan = proposed(*hosts)
    assert {one.code for one in plan.left_out} == ({"shared-volume-group"} if refused else set())
    assert bool(plan.warnings) is refused
    assert len(plan.jobs) == (0 if refused else 2)


def test_a_file_system_that_hosts_call_differently_is_doubtful() -> None:
    def shared(**fields: Any) -> Any:
        (found,) = shared_places(
            [host("h1", places=(FILES,)), host("h2", places=(replace(FILES, **fields),))]
        )
        return found

    assert not shared().is_doubtful
    assert shared(storage="").is_doubtful
    assert shared(locks=False).is_doubtful
    assert not shared(locks=False).is_refused


def test_the_slowest_storage_sets_the_pace() -> None:
    policy = FleetPolicy(bandwidth={"default": "9M", "a": "2M", "b": "1M"})
    chains = (chain("own"), chain("both", storages=("a", "b")), chain("other", storages=("c",)))
    plan = proposed(host("h1", *chains), policy=policy)
    rates = {job.disks[0].top: job.options.bandwidth for job in plan.jobs}
    assert rates == {
        "/images/own": 9 << 20,
        "/images/both": 1 << 20,
        "/images/other": 9 << 20,
    }


def test_the_disks_of_a_machine_are_one_job() -> None:
    disks = [chain(name, domain="vm", target=name, images=9) for name in ("vda", "vdb")]
    plan = proposed(host("h1", *disks, chain("other")))
    machine, other = plan.jobs
    assert [disk.top for disk in machine.disks] == ["/images/vda", "/images/vdb"]
    assert len([key for key in machine.keys if key.startswith("image/")]) == 2
    assert machine.plan_digest not in {"d" * 32, other.plan_digest}
    assert machine.figures is not None
    assert (machine.figures.hidden_bytes, other.plan_digest) == (2 << 20, "d" * 32)
    assert machine.action == "merge"


@pytest.mark.parametrize(("same", "jobs"), [(True, 1), (False, 2)])
def test_images_of_two_storages_can_have_the_same_id(same: bool, jobs: int) -> None:
    """Without a time of birth that is made of the number of the inode alone."""
    ids: dict[str, Any] = {"base_id": "1" * 32, "image_ids": ("1" * 32, "2" * 32)}
    plan = proposed(
        host("h1", chain("a", places=("/nfs",), **ids), places=(FILES,)),
        host(
            "h2",
            chain("b", places=("/nfs",), **ids),
            places=(FILES if same else replace(FILES, id="nfs4 s:/y"),),
        ),
    )
    assert [len(job.disks) for job in plan.jobs] == [1] * jobs


@pytest.mark.parametrize(("disks", "images", "jobs"), [(8, 300, 2), (64, 300, 11), (70, 2, 2)])
def test_however_long_its_chains_are_a_machine_has_jobs(disks: int, images: int, jobs: int) -> None:
    chains = [
        chain(
            f"{disk:03}",
            domain="vm",
            base_id=f"{disk:032x}",
            image_ids=tuple(f"{image:016x}{disk:016x}" for image in range(images)),
        )
        for disk in range(disks)
    ]
    plan = proposed(host("h1", *chains))
    assert plan.left_out == ()
    assert len(plan.jobs) == jobs
    assert [disk.top for job in plan.jobs for disk in job.disks] == [one.leaf for one in chains]
    for job in plan.jobs:
        record = JobRecord(
            **{name: getattr(job, name) for name in job.__struct_fields__},
            submitted=Submission(by="u" * 200, at="a" * 40),
        )
        record_in({"record": msgspec.to_builtins(record)})


def test_a_job_that_no_host_would_take_is_not_planned() -> None:
    (job,) = proposed(host("h1", chain("a"))).jobs
    (disk,) = job.disks
    many = replace(disk, image_ids=tuple(f"{image:032x}" for image in range(2001)))
    with pytest.raises(ValueError, match="2002 images"):
        read_again(replace(job, disks=(many,)))
    large = replace(disk, top="/" + "a" * 4000, base="/" + "b" * 4000)
    with pytest.raises(ValueError, match="more than"):
        read_again(replace(job, disks=(large,) * 64))


def test_a_running_machine_merges_only_if_the_policy_says_so() -> None:
    running = chain(
        "vda",
        in_use=True,
        domain="vm",
        target="vda",
        domain_uuid="12345678-1234-1234-1234-123456789012",
        refusals=(Finding("image-locked", "it is", "do"),),
    )
    assert leaves(proposed(host("h1", running))) == []
    policy = FleetPolicy(running="merge", merging=PolicyMerging(keep_name=True, delete=True))
    stored = StoredInventory((host("h1", running), host("h2", replace(running, in_use=False))), ())
    (job,) = propose(stored, policy, job_options_of(policy), 7, NOW).jobs
    assert (job.host, job.action, job.priority) == ("h1", "live-merge", 7)
    assert job.domain is not None
    assert (job.domain.name, job.disks[0].target) == ("vm", "vda")
    assert job.options == JobOptions(delete=True), "a live merge has no --keep-name"
    worse = replace(running, refusals=(Finding("base-newer", "it is", "do"),))
    assert leaves(proposed(host("h1", worse), policy=policy)) == []


def test_what_a_retention_keeps_is_thinned_out_disk_by_disk() -> None:
    policy = FleetPolicy(
        retention=PolicyRetention(keep_last=2, keep_within="7d"), windows=("22:00-05:00",)
    )
    disks = [chain(name, domain="vm", images=9) for name in ("vda", "vdb")]
    plan = proposed(host("h1", *disks, chain("short", images=3)), policy=policy)
    assert [len(job.disks) for job in plan.jobs] == [1, 1]
    assert {job.action for job in plan.jobs} == {"thin-out"}
    assert plan.jobs[0].options == JobOptions(keep_last=2, keep_within=7 * 86_400.0)
    assert plan.jobs[0].windows == ("22:00-05:00",)
    assert [one.code for one in plan.left_out] == ["all-stay"]


def test_old_scans_and_missing_ones_are_warned_of() -> None:
    old = replace(host("h1", chain("a")), scanned_at=NOW - 30 * 86_400)
    plan = propose(StoredInventory((old,), ("h2",)), FleetPolicy(), JobOptions(), 0, NOW)
    assert any("h2 has not been scanned" in one for one in plan.warnings)
    assert any("30 days old" in one for one in plan.warnings)


def test_what_no_scan_could_look_at_is_warned_of() -> None:
    found = replace(host("h1", chain("a")), left_out=("/srv: Permission denied", "no libvirt"))
    (warning,) = proposed(found).warnings
    assert warning.startswith("h1 was not scanned whole: /srv: Permission denied (1 more")
    shown = plain_text(inventory_report(overview_of(StoredInventory((found,), ()))))
    assert "h1: no libvirt" in shown


@pytest.mark.parametrize(
    "fields",
    [
        {"domain": "-rf", "domain_uuid": UUID, "in_use": True, "target": "vda"},
        {"domain": "vm", "domain_uuid": UUID, "in_use": True, "target": None},
        {"leaf": "/images/\udcff"},
        {"base_id": "not one"},
    ],
)
def test_a_chain_that_no_job_can_name_is_no_end_of_the_plan(fields: dict[str, Any]) -> None:
    odd = host("h2", chain("odd", **fields))
    found = _read("h2", encode(odd))
    assert found == odd, "nor of its host's inventory"
    plan = proposed(host("h1", chain("good")), odd, policy=FleetPolicy(running="merge"))
    assert [job.host for job in plan.jobs] == ["h1"]
    assert [one.code for one in plan.left_out] == ["unusable"]
    assert plan_in(encode(plan).encode(), "plan.json") == plan, "and it can be submitted"


def test_an_inventory_that_is_deep_is_none() -> None:
    deep = "[" * 100_000 + "]" * 100_000
    assert _read("h1", f'{encode(host("h1"))[:-1]},"more":{deep}}}') is None


def test_a_plan_is_shown() -> None:
    plan = proposed(host("h1", chain("a", domain="vm1"), chain("b", in_use=True)))
    text = plain_text(fleet_plan_report(view_of(plan, NOW)))
    assert "1 job on 1 host" in text
    assert "vm1" in text
    assert "in-use: a process has it open" in text


def test_what_a_policy_says_of_merging_is_what_jobs_may_ask_for() -> None:
    assert set(PolicyMerging.__struct_fields__) < set(JobOptions.__struct_fields__)
    assert job_options_of(FleetPolicy()) == JobOptions()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("least_image = 3", "did you mean 'least_images'"),
        ("[retention]\nkeep-last = 3", "[retention] 'keep-last' is not a key"),
        ("[retention]\nkeep_checkpoints = true", "without one nothing would stay"),
        ("[merging]\nverify = 'none'", "merging.verify: Invalid enum value 'none'"),
        ("[merging]\nlock_command = 'reboot'", "there are verify, delete"),
        ("least_freed = 'much'", "least_freed: "),
        ("least_freed = 7", "least_freed: "),
        ("windows = ['22-5']", "windows"),
        ("[limits]\n'host/h1' = -1", "limits"),
        ("least_images =", "Invalid value"),
        ("window_end = 'never'", "window_end"),
    ],
)
def test_a_policy_is_read_strictly(text: str, said: str) -> None:
    with pytest.raises(FleetPolicyUnusable) as refusal:
        policy_in(text.encode(), "policy.toml")
    assert said in refusal.value.sentence


def test_hosts_add_up_over_time() -> None:
    points = [("a", TrendPoint(10, 5, 100, 10)), ("b", TrendPoint(20, 9, 1, 1))]
    points.append(("a", TrendPoint(30, 2, 50, 0)))
    assert list(added_up(points)) == [
        TrendPoint(10, 5, 100, 10),
        TrendPoint(20, 9, 101, 11),
        TrendPoint(30, 9, 51, 1),
    ]
    many = [("a", TrendPoint(moment, 1, moment, 0)) for moment in range(5000)]
    found = list(added_up(many))
    assert len(found) <= 202
    assert found[-1] == TrendPoint(4999, 1, 4999, 0)
    assert list(added_up([])) == []
