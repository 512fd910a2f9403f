# SPDX-License-Identifier: Apache-2.0
"""A fleet on one machine: hosts are directories, workers are processes, the database is real."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

from chainmerge.__about__ import __version__
from chainmerge.cli.fleet.configuration import host_in
from chainmerge.cli.main import run
from chainmerge.fleet.database import address
from tests.support.cli import COMMAND, Ran, chainmerge, environment
from tests.support.postgresql import Cluster
from tests.support.qemu import run as run_tool

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PATIENCE = 60.0
_PLANNING = (b"\0--dry-run\0", b"\0list\0", b"\0plan\0")


def wait_until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Wait for something that is to come true, and return it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"in vain: {what}")


def run_here(*words: str | Path) -> Ran:
    """Run a command in this process.

    A process of its own costs a quarter of a second of a processor, and most commands of a test
    only lead to what it is about.
    """
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        status = run(["--no-config", *map(str, words)])
    for stream in streams:
        stream.seek(0)
    return Ran(status, *(stream.read() for stream in streams))


@dataclass
class Host:
    """A host: its configuration, its images, and its worker."""

    fleet: Fleet
    name: str
    directory: Path
    worker: subprocess.Popen[bytes] | None = None

    @property
    def config(self) -> Path:
        return self.directory / "fleet.toml"

    @property
    def images(self) -> Path:
        return self.directory / "images"

    @property
    def state(self) -> Path:
        return self.directory / "state"

    def chain(self, name: str, megabytes: int = 1, directory: Path | None = None) -> Path:
        """A chain of two images with data in both; returns its top."""
        where = directory or self.images
        base, top = where / f"{name}.base", where / f"{name}.top"
        run_tool("qemu-img", "create", "-q", "-f", "qcow2", str(base), "64M")
        size = f"{megabytes}M"
        run_tool("qemu-io", "-c", f"write -q -P 1 0 {size}", str(base))
        overlay = ["-f", "qcow2", "-F", "qcow2", "-b", str(base), str(top)]
        run_tool("qemu-img", "create", "-q", *overlay)
        run_tool("qemu-io", "-c", f"write -q -P 2 512K {size}", str(top))
        return top

    def write(self, image: Path) -> None:
        """Write to an image, as its guest would."""
        run_tool("qemu-io", "-c", "write -q -P 3 32M 1M", str(image))

    def planned(self, *words: str | Path) -> dict[str, Any]:
        """What `fleet plan` prints."""
        ran = run_here("fleet", "plan", "--config", self.config, *words)
        assert ran.status == 0, ran.err
        found: dict[str, Any] = json.loads(ran.out)
        return found

    def start(self, *words: str, **more_environment: str) -> subprocess.Popen[bytes]:
        """Start the worker."""
        self.worker = subprocess.Popen(
            [*COMMAND, "fleet", "worker", "--config", str(self.config), *words],
            env=environment(**more_environment),
            stdin=subprocess.DEVNULL,
            stderr=(self.directory / "worker.err").open("ab"),
        )
        return self.worker

    def kill(self) -> None:
        """End the worker as a crash does."""
        assert self.worker is not None
        self.worker.kill()
        self.worker.wait()

    def stop(self) -> int:
        """End the worker as a service manager does."""
        assert self.worker is not None
        self.worker.send_signal(signal.SIGTERM)
        return self.worker.wait(PATIENCE)

    def children(self) -> list[int]:
        """The processes that do its jobs now, whoever started them."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                is_of_worker = str(self.images).encode() in words and b"\0--no-config\0" in words
                if is_of_worker and not any(word in words for word in _PLANNING):
                    found.append(int(entry.name))
        return found


@dataclass
class Fleet:
    """Hosts and their database."""

    cluster: Cluster
    database: str
    directory: Path
    hosts: list[Host] = field(default_factory=list)
    _connection: psycopg.Connection[Any] | None = field(default=None, init=False)

    def set_up(self) -> None:
        """Make the tables, and a login for an operator."""
        self._write_configuration(self._owners, self.database)
        ran = chainmerge("fleet", "init", "--config", self._owners)
        assert ran.status == 0, ran.err
        self.let_operator_in()

    def let_operator_in(self) -> None:
        """Make a login for an operator, where the tables are there."""
        self._write_configuration(self.operators, self._login("operator", "chainmerge_operator"))

    @property
    def _owners(self) -> Path:
        return self.directory / "owner.toml"

    @property
    def operators(self) -> Path:
        return self.directory / "operator.toml"

    def _write_configuration(self, file: Path, database: str) -> None:
        file.write_text(f"database = {json.dumps(database)}\n")

    def _login(self, name: str, role: str) -> str:
        """A login of the server that has a role; how it reaches the database."""
        with psycopg.connect(self.database, autocommit=True) as connection:
            with suppress(psycopg.errors.DuplicateObject):
                connection.execute(f'CREATE ROLE "{name}" LOGIN'.encode())
            connection.execute(f'GRANT {role} TO "{name}"'.encode())
        return self.address_of(name)

    def address_of(self, login: str) -> str:
        """How a login reaches the database."""
        return self.database.replace("user=owner", f"user={login}")

    def run(self, *words: str | Path) -> Ran:
        """A command of an operator."""
        return chainmerge("fleet", words[0], "--config", self.operators, *words[1:])

    def did(self, *words: str | Path) -> Any:
        """The document that such a command prints."""
        ran = run_here("fleet", words[0], "--config", self.operators, "--json", *words[1:])
        assert ran.status == 0, ran.out + ran.err
        return ran.json

    def host(self, name: str, shared: Path | None = None, **settings: str) -> Host:
        """A new host, with its configuration; *settings* are lines of that."""
        host = Host(self, name, self.directory / name)
        host.images.mkdir(parents=True, exist_ok=True)
        machine = host.directory / "machine-id"
        machine.write_text(f"{name}\n")
        directories = [str(host.images), *([str(shared)] if shared else [])]
        lines = {
            "database": json.dumps(self._login(f"host-{name}", "chainmerge_worker")),
            "host": json.dumps(name),
            "directories": json.dumps(directories),
            "state": json.dumps(str(host.state)),
            "poll": "0.2",
            "machine_id_file": json.dumps(str(machine)),
            **settings,
        }
        text = "".join(f"{key} = {value}\n" for key, value in lines.items())
        if shared:
            text += f'[storages]\nnfs = "{shared}"\n'
        host.config.write_text(text)
        self.hosts.append(host)
        return host

    def register(self, *hosts: Host) -> None:
        """Have hosts known, as if their workers had been there."""
        for host in hosts:
            found = host_in(host.config)
            with psycopg.connect(address(found.fleet.database)) as connection:
                connection.execute(
                    "SELECT register_host(%s, %s, %s)", (found.name, found.machine_id, __version__)
                )

    def queue(self, host: str, *rows: Any) -> None:
        """Put rows on a host's queue that no command would put there."""
        for arguments in rows:
            self.execute(
                "INSERT INTO procrastinate_jobs (queue_name, task_name, args)"
                " VALUES ('host.' || %s, 'chainmerge.fleet', %s::jsonb)",
                host,
                json.dumps(arguments),
            )

    def submit(self, *documents: dict[str, Any]) -> list[int]:
        """Submit plans as one; returns the numbers of the new jobs."""
        file = self.directory / "plan.json"
        jobs = [job for document in documents for job in document["jobs"]]
        file.write_text(json.dumps({"version": 1, "jobs": jobs}))
        numbers: list[int] = self.did("submit", file)["jobs"]
        return numbers

    def outcomes(self) -> dict[int, str]:
        """What became of the jobs that have ended."""
        return dict(self.ask("SELECT job, outcome FROM results WHERE NOT superseded"))

    def claimed(self) -> list[int]:
        """The jobs that workers have in hand."""
        found = self.ask("SELECT id FROM procrastinate_jobs WHERE status = 'doing' ORDER BY id")
        return [job for (job,) in found]

    def running(self) -> list[int]:
        """The jobs that hold their keys."""
        return [job for (job,) in self.ask("SELECT DISTINCT job FROM leases ORDER BY job")]

    def ask(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Ask the database itself, as its owner."""
        try:
            return self._owner().execute(query.encode(), values).fetchall()
        except psycopg.OperationalError:
            # The server was stopped since it was asked last.
            self._disconnect()
            return self._owner().execute(query.encode(), values).fetchall()

    def execute(self, script: str, *values: Any) -> None:
        """Have the database's owner change something."""
        self._owner().execute(script.encode(), values or None)

    def _owner(self) -> psycopg.Connection[Any]:
        # One for all questions: a test asks many times a second, and each is a process there.
        if self._connection is None:
            self._connection = psycopg.connect(
                self.database, options="-c search_path=chainmerge", autocommit=True
            )
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def wait_for_results(self, jobs: Sequence[int], seconds: float = PATIENCE) -> dict[int, str]:
        """Wait until all of these have ended."""

        def ended() -> dict[int, str] | None:
            rows = self.ask(
                "SELECT job, outcome FROM results WHERE NOT superseded AND job = ANY (%s)",
                list(jobs),
            )
            return dict(rows) if len(rows) == len(set(jobs)) else None

        found: dict[int, str] = wait_until(ended, f"the end of jobs {jobs}", seconds)
        return found

    def close(self) -> None:
        """End whatever of it runs."""
        for host in self.hosts:
            if host.worker is not None and host.worker.poll() is None:
                host.kill()
        for host in self.hosts:
            for child in host.children():
                os.kill(child, signal.SIGKILL)
        self._disconnect()


def is_merged(top: Path) -> bool:
    """Whether base holds all of a chain of :meth:`Host.chain`, and no merge is unfinished."""
    return are_merged([top])


def are_merged(tops: Sequence[Path]) -> bool:
    """The same of several."""
    bases = [top.with_suffix(".base") for top in tops]
    ran = chainmerge("status", "--json", *bases)
    return ran.status == 0 and all(map(_hold_the_same, tops, bases))


def _hold_the_same(one: Path, other: Path) -> bool:
    words = ["qemu-img", "compare", "-q", "-U", str(one), str(other)]
    return subprocess.run(words, check=False).returncode == 0
