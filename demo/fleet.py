# SPDX-License-Identifier: Apache-2.0
"""``make demo-fleet``: three hosts, fifty merges, one worker killed.

Hosts are directories on this machine, each with a worker, a login of the database, and chains of
its own; one more directory is a storage that all of them reach. The database is a PostgreSQL
server of the demo's own, on a socket in a temporary directory.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console

from demo.fleet_scenario import CHAINS, HOSTS, RATE, SHARED_LIMIT, build_chains
from tests.support.cli import COMMAND, environment
from tests.support.fleet import Fleet
from tests.support.postgresql import running_cluster

if TYPE_CHECKING:
    from tests.support.fleet import Host

_KILLED_AFTER: Final = 0.2
"""Share of the jobs that have ended when a worker is killed."""
_DOWN: Final = 3.0
"""Seconds until its service starts it again."""
_PATIENCE: Final = 600.0
_INTRODUCTION = """
{hosts} hosts, {chains} chains of two to four images: some on storage of each host's own,
some on a storage that all of them reach, which bears {shared} merges at the same time.
Each host does two at a time, and copies {rate} bytes a second for each. When a fifth is
done, the worker of h1 is killed as by a crash (SIGKILL), and started again.
"""
_POLICY = """
least_images = 2

[merging]
delete = true

[limits]
{limits}
"storage/nfs" = {shared}

[bandwidth]
default = "{rate}"
nfs = "{rate}"
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo-fleet", description=__doc__)
    parser.add_argument("--report", type=Path, default=Path("build/fleet.html"), metavar="FILE")
    parser.add_argument("--chains", type=int, default=CHAINS, metavar="N")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    with (
        tempfile.TemporaryDirectory(prefix="chainmerge-demo-") as scratch,
        running_cluster() as cluster,
    ):
        fleet = Fleet(cluster, cluster.new_database("fleet"), Path(scratch))
        fleet.set_up()
        try:
            return _Demo(console, fleet).run(arguments.chains, arguments.report)
        finally:
            fleet.close()


class _Demo:
    """A fleet, and what is done with it, command by command."""

    def __init__(self, console: Console, fleet: Fleet) -> None:
        self._console = console
        self._fleet = fleet
        self._shared = fleet.directory / "shared"
        self._shared.mkdir()
        self._hosts = [fleet.host(name, self._shared, connect='""') for name in HOSTS]

    def run(self, count: int, report: Path) -> int:
        introduction = _INTRODUCTION.format(
            hosts=len(HOSTS), chains=count, shared=SHARED_LIMIT, rate=RATE
        )
        self._console.print(introduction, soft_wrap=True)
        with self._console.status("building images"):
            tops = build_chains(self._hosts, self._shared, count)
        for host in self._hosts:
            host.start()
        while len(self._fleet.ask("SELECT FROM hosts")) < len(self._hosts):
            time.sleep(0.2)
        self._scan()
        report.parent.mkdir(parents=True, exist_ok=True)
        self._show("report", "-o", str(report.with_stem(f"{report.stem}-before")))
        plan = self._plan()
        submitted = self._fleet.did("submit", plan)
        self._console.print("\n$ chainmerge fleet submit plan.json", style="bold")
        self._console.print("\n".join(submitted["done"]))
        self._watched(self._hosts[1], len(submitted["jobs"]))
        self._scan()
        self._show("report", "-o", str(report))
        return self._verdict(submitted["jobs"], tops)

    def _scan(self) -> None:
        """Have the hosts scan one after the other, as they are one machine.

        Each would see what the scans of the others have open at that moment, and take it for used.
        """
        for host in self._hosts[:-1]:
            self._fleet.did("scan", "--wait", host.name)
        self._show("scan", "--wait", self._hosts[-1].name)

    def _show(self, *words: str) -> None:
        """Run a command of an operator as somebody who types it sees it."""
        self._console.print(f"\n$ chainmerge fleet {' '.join(words)}", style="bold")
        # What is printed by other processes must not overtake it.
        self._console.file.flush()
        subprocess.run(self._words(*words), env=environment(), check=True, timeout=_PATIENCE)

    def _words(self, *words: str) -> list[str]:
        return [*COMMAND, "fleet", words[0], "--config", str(self._fleet.operators), *words[1:]]

    def _plan(self) -> Path:
        policy, plan = (self._fleet.directory / name for name in ("policy.toml", "plan.json"))
        limits = "\n".join(f'"host/{name}" = 2' for name in HOSTS)
        policy.write_text(_POLICY.format(limits=limits, shared=SHARED_LIMIT, rate=RATE))
        self._show("plan", "--policy", str(policy), "-o", str(plan))
        return plan

    def _watched(self, victim: Host, jobs: int) -> None:
        """Have the live table shown until all is done, and kill a worker meanwhile."""
        self._console.print("\n$ chainmerge fleet watch --until-idle", style="bold")
        self._console.file.flush()
        watch = subprocess.Popen(
            self._words("watch", "--until-idle", "--interval", "1"), env=environment()
        )
        try:
            running = self._killed_when(victim, int(jobs * _KILLED_AFTER))
            watch.wait(_PATIENCE)
        finally:
            watch.kill()
            watch.wait()
        # Said now, as it would have been in the middle of the table.
        self._console.print(
            f"\nThe worker of {victim.name} was killed with {len(running)} jobs in its hands, and "
            f"started again {_DOWN:.0f} s later: {', '.join(map(str, running)) or 'none'}."
        )

    def _killed_when(self, victim: Host, ended: int) -> list[int]:
        """Kill a worker once so many jobs have ended; return those that it had the keys of."""
        end = time.monotonic() + _PATIENCE
        while self._fleet.ask("SELECT count(*) FROM results")[0][0] < ended + len(HOSTS):
            if time.monotonic() > end:
                raise TimeoutError(f"{ended} jobs have not ended in time")
            time.sleep(0.2)
        victim.kill()
        held = self._fleet.ask(
            "SELECT DISTINCT job FROM leases WHERE host = %s ORDER BY job", victim.name
        )
        time.sleep(_DOWN)
        victim.start()
        return [job for (job,) in held]

    def _verdict(self, jobs: list[int], tops: list[Path]) -> int:
        outcomes = self._fleet.outcomes()
        done = [job for job in jobs if outcomes.get(job) in {"done", "already"}]
        right = [top for top in tops if is_right(top)]
        held = self._fleet.running()
        self._console.print(
            f"\n{len(done)} of {len(jobs)} jobs done; {len(right)} of {len(tops)} disks hold what "
            f"they held, in one image each; {len(held)} jobs hold keys."
        )
        fine = len(done) == len(jobs) == len(right) == len(tops) and not held
        self._console.print("as it should be" if fine else "WRONG", style="bold")
        return 0 if fine else 1


def is_right(top: Path) -> bool:
    """Whether one image is left of a chain, and reads as that did."""
    # Data moves up or down, whichever is less.
    left = [image for image in (top, top.with_suffix(".base")) if image.exists()]
    if len(left) != 1:
        return False
    expected = top.with_suffix(".expected")
    compare = ["qemu-img", "compare", "-q", str(expected), str(left[0])]
    return subprocess.run(compare, check=False).returncode == 0


if __name__ == "__main__":
    if shutil.which("qemu-img") is None:
        sys.exit("qemu-img is missing: scripts/setup installs it")
    sys.exit(main())
