# SPDX-License-Identifier: Apache-2.0
"""Whoever dies, at whatever moment: every chain is merged, once, and nothing is left."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import pytest

from tests.support.cli import COMMAND, chainmerge, environment
from tests.support.fleet import are_merged
from tests.support.fleet_actions import WorkOfEachAction

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.fleet import Fleet, Host

MOMENTS: Final = {"quick": 4, "soak": 200}
MERGES_A_MOMENT: Final = 1.5
MOST_DEATHS_OF_A_CHILD: Final = 2
"""One that dies more often than that has failed, rightly."""


class Reaper:
    """Kills somebody, and has a service manager's part in what follows."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self.fleet = fleet
        self.chance = random.Random(seed)
        self.children_killed: Counter[str] = Counter()

    def kill_worker(self) -> None:
        host = self.chance.choice(self.fleet.hosts)
        host.kill()
        host.start()

    def kill_child(self) -> None:
        for host in self.chance.sample(self.fleet.hosts, len(self.fleet.hosts)):
            for child in host.children():
                top = _last_word(child)
                if self.children_killed[top] < MOST_DEATHS_OF_A_CHILD:
                    self.children_killed[top] += 1
                    with suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)
                    return

    def kill_submitter(self, plan: Path) -> None:
        words = [*COMMAND, "fleet", "submit", "--config", str(self.fleet.operators), str(plan)]
        submitter = subprocess.Popen(
            words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(self.chance.uniform(0, 1))
        submitter.kill()
        submitter.wait()

    def kill_database(self) -> None:
        self.fleet.cluster.stop("immediate")
        time.sleep(self.chance.uniform(0, 1))
        self.fleet.cluster.start()


def _last_word(process: int) -> str:
    try:
        with open(f"/proc/{process}/cmdline", "rb") as file:  # noqa: PTH123
            return file.read().rstrip(b"\0").rpartition(b"\0")[2].decode()
    except OSError:
        return ""


def has_all_done_whoever_dies(fleet: Fleet, jobs: list[object], moments: int) -> None:
    """Submit jobs, start all workers, kill in so many moments, and see how all of them end."""
    seed = int(os.environ.get("CHAINMERGE_FLEET_SEED", random.randrange(1 << 32)))
    print(f"CHAINMERGE_FLEET_SEED={seed}")
    plan = fleet.directory / "all.json"
    plan.write_text(json.dumps({"version": 1, "jobs": jobs}))
    reaper = Reaper(fleet, seed)
    for host in fleet.hosts:
        host.start()
    reaper.kill_submitter(plan)
    numbers = fleet.did("submit", plan)["jobs"] or [
        job for (job,) in fleet.ask("SELECT id FROM procrastinate_jobs")
    ]
    deaths = [reaper.kill_worker, reaper.kill_child, reaper.kill_database]
    for moment in range(moments):
        time.sleep(reaper.chance.uniform(0, 1.5))
        # Each at least once, however few there are.
        deaths[moment % 3 if moment < 3 else reaper.chance.randrange(3)]()
        reaper.kill_submitter(plan)
    outcomes = fleet.wait_for_results(numbers, 120 + 10 * moments)
    assert set(outcomes.values()) <= {"done", "already"}, fleet.did("results")
    assert len(outcomes) == len(jobs) == fleet.ask("SELECT count(*) FROM procrastinate_jobs")[0][0]
    assert fleet.ask("SELECT count(*) FROM results")[0][0] == len(jobs)
    assert fleet.running() == []
    # Whatever is named: nothing is unfinished anywhere.
    assert chainmerge("status", *(host.images for host in fleet.hosts)).status == 0


@pytest.mark.parametrize("thoroughness", ["quick", pytest.param("soak", marks=pytest.mark.soak)])
def test_every_chain_is_merged_whoever_dies(
    fleet: Fleet, tmp_path_factory: pytest.TempPathFactory, thoroughness: str
) -> None:
    moments = MOMENTS[thoroughness]
    shared = tmp_path_factory.mktemp("shared")
    hosts = [fleet.host(f"h{number}", shared) for number in range(3)]
    fleet.did("limit", "storage/nfs", "2")
    count = max(6, int(moments * MERGES_A_MOMENT))
    tops = {host.name: _chains(host, shared, count // 3) for host in hosts}
    # Planned in portions: a command line takes only so many words.
    jobs = [job for host in hosts for job in _planned(host, tops[host.name])]
    has_all_done_whoever_dies(fleet, jobs, moments)
    assert are_merged([top for each in tops.values() for top in each])
    assert chainmerge("status", shared).status == 0


@pytest.mark.parametrize("thoroughness", ["quick", pytest.param("soak", marks=pytest.mark.soak)])
def test_every_action_is_done_whoever_dies(fleet: Fleet, thoroughness: str) -> None:
    moments = MOMENTS[thoroughness]
    hosts = [fleet.host(f"h{number}") for number in range(3)]
    works = [
        WorkOfEachAction(host, f"{number}-")
        for host in hosts
        for number in range(max(1, moments // 10))
    ]
    jobs: list[object] = []
    for work in works:
        work.make()
        jobs += [job for plan in work.planned("--bandwidth", "1M").values() for job in plan["jobs"]]
    has_all_done_whoever_dies(fleet, jobs, moments)
    for work in works:
        work.require_done()


def _chains(host: Host, shared: Path, count: int) -> list[Path]:
    """Half of a host's chains on its own storage, half on the shared one."""
    places = (host.images, shared)
    return [host.chain(f"{host.name}-{number}", 1, places[number % 2]) for number in range(count)]


def _planned(host: Host, tops: list[Path]) -> list[object]:
    jobs: list[object] = []
    for start in range(0, len(tops), 20):
        jobs += host.planned("--bandwidth", "1M", *tops[start : start + 20])["jobs"]
    return jobs
