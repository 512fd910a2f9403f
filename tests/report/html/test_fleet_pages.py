# SPDX-License-Identifier: Apache-2.0
"""What pages about a fleet say."""

from __future__ import annotations

from msgspec.structs import replace

from chainmerge.documents.fleet import FleetHostStatus, FleetKeyStatus, FleetStatus
from chainmerge.report.fleet_metrics import metrics_of_fleet
from chainmerge.report.html.fleet_pages import html_of_fleet, html_of_fleet_plan
from chainmerge.report.html.fleet_view import chains_of_fleet
from tests.report.test_fleet_watch import RUNNING, WAITING
from tests.support.fleet_inventories import fleet_pictures, fleet_plan


def test_all_that_is_known_is_drawn() -> None:
    page = html_of_fleet(fleet_pictures("vm1"))
    for said in (
        "1 host scanned, 1 never",
        "6 to 10 images",
        "What merging frees, by host",
        "What stale bitmaps take, by host",
        "Why merges would be refused",
        "How jobs have ended",
        "Unfinished merges",
        "share the volume group",
        "Trend: the longest chain",
    ):
        assert said in page, said


def test_what_several_hosts_see_counts_once() -> None:
    found = fleet_pictures("a")
    (host,) = found.hosts
    both = replace(found, hosts=(host, replace(host, host="other")))
    assert len(chains_of_fleet(both).chains) == 1
    (chain,) = host.chains
    another = replace(host, host="other", chains=(replace(chain, base_id="1" * 32),))
    assert len(chains_of_fleet(replace(found, hosts=(host, another))).chains) == 2


def test_a_plan_is_a_table_in_its_order() -> None:
    plan = fleet_plan("vm1")
    first, second = plan.jobs
    page = html_of_fleet_plan(replace(plan, jobs=(replace(first, vm="zzz"), second)))
    assert page.index("zzz: vm1") < page.index("vm1: vm1, vm1")
    assert "in-use, 3 chains, such as vm1: vm1" in page


def test_metrics_of_a_fleet() -> None:
    host = FleetHostStatus("h1", "", 5.0, True, "1", 1, 1)
    keys = (FleetKeyStatus("host/h1", 1, 2, False), FleetKeyStatus("fleet", 1, None, True))
    running = replace(RUNNING, bytes_done=1, bytes_total=5)
    status = FleetStatus(1, (running, WAITING), (host,), keys)
    text = metrics_of_fleet(status, fleet_pictures('a"\\b')).decode()
    for line in (
        'chainmerge_fleet_jobs{host="h1",state="running"} 1.0',
        'chainmerge_fleet_host_drained{host="h1"} 1.0',
        'chainmerge_fleet_key_limit{key="host/h1"} 2.0',
        "chainmerge_fleet_running_bytes_left 4.0",
        'chainmerge_fleet_results{outcome="done"} 3.0',
        'chainmerge_fleet_results{outcome="lost"} 0.0',
        "chainmerge_fleet_shared_refused 1.0",
    ):
        assert line in text.splitlines(), line
    assert text.startswith("# HELP chainmerge_")
