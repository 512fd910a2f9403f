# SPDX-License-Identifier: Apache-2.0
"""What a worker costs that has nothing to do, and one that has much."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.support.fleet import wait_until

if TYPE_CHECKING:
    from tests.support.fleet import Fleet

MOST_STATEMENTS_A_SECOND: Final = 1.0
MOST_CONNECTIONS: Final = 2
MOST_MIB: Final = 45
SECONDS: Final = 15
JOBS: Final = 150
IMAGES: Final = 300
MOST_SECONDS: Final = 15.0
"""To give so many jobs of so many images each their keys."""


def test_an_idle_worker_costs_little(fleet: Fleet) -> None:
    # As often as it looks without an entry in the configuration.
    host = fleet.host("h1", poll="3.0")
    fleet.execute("ALTER ROLE \"host-h1\" SET log_statement = 'all'")
    worker = host.start()
    wait_until(lambda: fleet.ask("SELECT FROM hosts"), "a worker")
    wait_until(lambda: _connections(fleet) == MOST_CONNECTIONS, "its connections")
    # What it says once, when it starts, is no cost of being idle.
    wait_until(lambda: "procrastinate_fetch_job" in _log(fleet), "its first look for jobs")
    before = _statements(fleet)
    time.sleep(SECONDS)
    statements = _statements(fleet) - before
    assert 0 < statements <= SECONDS * MOST_STATEMENTS_A_SECOND
    assert _connections(fleet) <= MOST_CONNECTIONS
    status = Path(f"/proc/{worker.pid}/status").read_text()
    resident = int(status.split("RssAnon:")[1].split()[0]) / 1024
    print(f"{statements / SECONDS:.2f} statements/s, {resident:.0f} MiB")
    assert resident <= MOST_MIB


def test_jobs_of_long_chains_are_given_their_keys_soon(fleet: Fleet) -> None:
    host = fleet.host("h1", connect='""')
    assert host.start("--once").wait(60) == 0
    (job,) = host.planned(host.chain("a"))["jobs"]
    (disk,) = job["disks"]
    jobs = []
    for chain in range(JOBS):
        ids = [f"{chain:016x}{image:016x}" for image in range(IMAGES)]
        of_chain = {**disk, "top": f"/{chain}", "base_id": ids[0], "image_ids": ids}
        keys = ["host/h1", *(f"image/{one}" for one in ids)]
        jobs.append({**job, "disks": [of_chain], "keys": keys})
    numbers = fleet.submit({"jobs": jobs})
    fleet.did("limit", "host/h1", str(JOBS))
    pairs = zip(numbers, jobs, strict=True)
    candidates = [{"job": number, "keys": ["fleet", *one["keys"]]} for number, one in pairs]
    # Nobody else in the fleet is given any meanwhile.
    started = time.monotonic()
    fleet.execute("UPDATE hosts SET login = session_user")
    taken = fleet.ask("SELECT * FROM take_leases('h1', %s::jsonb)", json.dumps(candidates))
    assert time.monotonic() - started < MOST_SECONDS
    assert sorted(taken) == [(number,) for number in numbers]
    # All of them again, of which none can be had.
    fleet.execute("UPDATE leases SET host = 'h2'")
    started = time.monotonic()
    assert fleet.ask("SELECT * FROM take_leases('h1', %s::jsonb)", json.dumps(candidates)) == []
    assert time.monotonic() - started < MOST_SECONDS


def _connections(fleet: Fleet) -> int:
    rows = fleet.ask("SELECT count(*) FROM pg_stat_activity WHERE usename = 'host-h1'")
    count: int = rows[0][0]
    return count


def _statements(fleet: Fleet) -> int:
    """What the server has logged: of no other login it logs statements."""
    return len(re.findall(r"LOG:  (?:statement|execute)", _log(fleet)))


def _log(fleet: Fleet) -> str:
    return (fleet.cluster.directory / "log").read_text()
