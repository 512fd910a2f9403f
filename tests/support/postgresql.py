# SPDX-License-Identifier: Apache-2.0
"""A PostgreSQL server of our own, on a socket in a directory of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import psycopg

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_DEBIAN: Final = Path("/usr/lib/postgresql")
_SETTINGS: Final = {
    "listen_addresses": "",
    "port": "5432",
    "fsync": "on",
    "shared_buffers": "16MB",
    "max_connections": "120",
    "log_statement": "none",
}


def tool(name: str) -> str:
    """A command of the server, which Debian keeps off the PATH."""
    found = shutil.which(name)
    candidates = [found] if found else sorted(map(str, _DEBIAN.glob(f"*/bin/{name}")))
    assert candidates, f"{name} is missing: scripts/setup installs postgresql"
    return candidates[-1]


class Cluster:
    """A server that can be stopped in any way, and started again."""

    def __init__(self, directory: Path, more: Mapping[str, str], rules: str | None) -> None:
        self.directory = directory
        self.data = directory / "data"
        settings = {**_SETTINGS, **more}
        self._port = settings["port"]
        self._run(tool("initdb"), "--no-sync", "-A", "trust", "-U", "owner", "-D", str(self.data))
        lines = [f"{name} = '{value}'" for name, value in settings.items()]
        lines.append(f"unix_socket_directories = '{directory}'")
        with (self.data / "postgresql.conf").open("a") as file:
            file.write("\n".join(lines) + "\n")
        if rules is not None:
            (self.data / "pg_hba.conf").write_text(f"{rules}\n")

    def start(self) -> None:
        log = str(self.directory / "log")
        self._run(tool("pg_ctl"), "-D", str(self.data), "-l", log, "-w", "start")

    def stop(self, mode: str = "fast") -> None:
        self._run(tool("pg_ctl"), "-D", str(self.data), "-m", mode, "-w", "stop")

    def address(self, user: str = "owner", database: str = "postgres") -> str:
        return f"host={self.directory} port={self._port} user={user} dbname={database}"

    def new_database(self, name: str, template: str = "template1") -> str:
        with psycopg.connect(self.address(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}".encode())
        return self.address(database=name)

    def _run(self, *words: str) -> None:
        # The server refuses to run as root.
        become = []
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            ids = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}"]
            become = ["setpriv", *ids, "--clear-groups"]
        ran = subprocess.run(
            [*become, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd="/",
            check=False,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
        assert ran.returncode == 0, ran.stdout.decode()


@contextmanager
def running_cluster(
    more: Mapping[str, str] = MappingProxyType({}), rules: str | None = None
) -> Iterator[Cluster]:
    """A server that is gone at the end. The path of its socket must be short.

    *more* are settings, *rules* is who may come in, as in ``pg_hba.conf``: without them, whoever
    comes from this machine.
    """
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="pg") as name:
        directory = Path(name)
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(directory, user.pw_uid, user.pw_gid)
        directory.chmod(0o755)
        cluster = Cluster(directory, more, rules)
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop("immediate")
