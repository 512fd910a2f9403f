# SPDX-License-Identifier: Apache-2.0
"""Measures many workers on one machine: idle, and with thousands of jobs that do nothing.

The server is a real PostgreSQL of its own; workers are processes with a login and a connection
each. What the machine's own load adds is in the figures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from chainmerge.fleet import operating, overview
from chainmerge.fleet.places import base_id_of
from tests.support.cli import environment
from tests.support.fleet import Fleet, Host, wait_until
from tests.support.postgresql import running_cluster

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SETTINGS: Final = {"max_connections": "300", "shared_buffers": "128MB"}
_STARTED: Final = 300.0
_BETWEEN_LOOKS: Final = 5.0


def _jobs_of(host: Host, count: int) -> list[dict[str, Any]]:
    """Jobs for images that exist, and that no child ever reads."""
    config = json.loads((host.directory / "job.json").read_text())
    return [_job(host, number, config) for number in range(count)]


def _job(host: Host, number: int, pattern: dict[str, Any]) -> dict[str, Any]:
    top, base = (host.images / f"{number}.{end}" for end in ("top", "base"))
    base.touch()
    base_id = base_id_of(str(base))
    return {
        **pattern,
        "disks": [{"top": str(top), "base": str(base), "base_id": base_id}],
        "keys": [f"host/{host.name}", f"image/{base_id}"],
        "plan_digest": base_id,
    }


def _pattern(host: Host) -> None:
    digest = hashlib.sha256(f"chainmerge-fleet {host.name}".encode()).hexdigest()[:32]
    fixed = {"v": 1, "host": host.name, "machine_id": digest, "action": "merge", "options": {}}
    (host.directory / "job.json").write_text(json.dumps({**fixed, "priority": 0}))


def _start(host: Host, module: list[str]) -> None:
    # In a fleet these are other machines, and take no time of the server's and the operator's.
    words = ["nice", "-n", "15", sys.executable, "-m", *module]
    host.worker = subprocess.Popen(words, env=environment(), stdin=subprocess.DEVNULL)


def _anonymous_mib(host: Host) -> float:
    assert host.worker is not None
    status = Path(f"/proc/{host.worker.pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def _measure_idle(fleet: Fleet, seconds: int) -> None:
    def connections() -> int:
        rows = fleet.ask("SELECT count(*) FROM pg_stat_activity WHERE usename LIKE 'host-%%'")
        return int(rows[0][0])

    for host in fleet.hosts:
        fleet.execute(f"ALTER ROLE \"host-{host.name}\" SET log_statement = 'all'")
    for host in fleet.hosts:
        # As often as it looks without an entry in the configuration.
        text = re.sub(r"(?m)^poll = .*$", "poll = 3.0", host.config.read_text())
        host.config.write_text(text)
        _start(host, ["chainmerge", "fleet", "worker", "--config", str(host.config)])
    count = len(fleet.hosts)
    wait_until(lambda: len(fleet.ask("SELECT FROM hosts")) == count, "all workers", _STARTED)
    wait_until(lambda: connections() >= 2 * count, "their connections", _STARTED)
    before = _statements(fleet)
    time.sleep(seconds)
    rate = (_statements(fleet) - before) / seconds / count
    memory = [_anonymous_mib(host) for host in fleet.hosts]
    print(
        f"idle, {count} workers: {rate:.2f} statements/s, {connections() / count:.1f} connections"
    )
    print(f"anonymous memory: {statistics.mean(memory):.1f} MiB each, {max(memory):.1f} at most")
    for host in fleet.hosts:
        host.stop()
        fleet.execute(f'ALTER ROLE "host-{host.name}" RESET log_statement')


def _statements(fleet: Fleet) -> int:
    log = (fleet.cluster.directory / "log").read_text()
    return len(re.findall(r"LOG:  (?:statement|execute)", log))


def _timed(act: Callable[[], object]) -> float:
    start = time.monotonic()
    act()
    return time.monotonic() - start


def _measure_load(fleet: Fleet, count: int) -> None:
    each = count // len(fleet.hosts)
    jobs = [job for host in fleet.hosts for job in _jobs_of(host, each)]
    plan = operating.plan_in(json.dumps({"version": 1, "jobs": jobs}).encode(), "plan")
    database = fleet.address_of("operator")
    print(f"submit {len(jobs)} jobs: {_timed(lambda: operating.submit(database, plan)):.1f} s")
    print(f"submit them again: {_timed(lambda: operating.submit(database, plan)):.1f} s")
    print(f"status of all of them: {_timed(lambda: overview.status(database)):.2f} s,")
    print(f"  {_timed(lambda: fleet.run('status', '--json')):.2f} s as a command")
    for host in fleet.hosts:
        fleet.did("limit", f"host/{host.name}", "4")
        text = re.sub(r"(?m)^poll = .*$", "poll = 1.0", host.config.read_text())
        host.config.write_text(text)
        _start(host, ["benchmarks.fleet.worker", str(host.config)])
    latencies = list(_latencies_until_done(fleet, database, len(jobs)))
    worst, usual = max(latencies), statistics.median(latencies)
    print(f"status meanwhile: {usual:.2f} s usually, {worst:.2f} s at most, {len(latencies)} times")
    first, last = fleet.ask("SELECT min(ended), max(ended) FROM results")[0]
    seconds = (last - first).total_seconds()
    print(f"{len(jobs)} jobs in {seconds:.0f} s: {len(jobs) / seconds:.0f} jobs/s")
    command = _timed(lambda: fleet.run("status", "--json"))
    print(f"status afterwards: {_timed(lambda: overview.status(database)):.2f} s,")
    print(f"  {command:.2f} s as a command")
    assert {row[0] for row in fleet.ask("SELECT DISTINCT outcome FROM results")} == {"done"}
    assert fleet.running() == []


def _latencies_until_done(fleet: Fleet, database: str, jobs: int) -> Iterator[float]:
    while True:
        yield _timed(lambda: overview.status(database))
        if fleet.ask("SELECT count(*) FROM results")[0][0] >= jobs:
            return
        time.sleep(_BETWEEN_LOOKS)


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet", description=__doc__)
    parser.add_argument("--workers", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--idle", type=int, default=60, help="seconds to measure idle workers")
    asked = parser.parse_args()
    build = Path(__file__).parents[2] / "build"
    build.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=build) as directory,
        running_cluster(_SETTINGS) as cluster,
    ):
        fleet = Fleet(cluster, cluster.new_database("fleet"), Path(directory))
        fleet.set_up()
        try:
            for number in range(asked.workers):
                _pattern(fleet.host(f"h{number}"))
            if asked.idle:
                _measure_idle(fleet, asked.idle)
            if asked.jobs:
                _measure_load(fleet, asked.jobs)
        finally:
            fleet.close()


if __name__ == "__main__":
    main()
