# SPDX-License-Identifier: Apache-2.0
"""Who may do what: logins by certificates over TLS, and what a stolen one is good for."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import socket
import stat
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import psycopg
import pytest

from tests.support.authority import Authority
from tests.support.cli import chainmerge
from tests.support.fleet import Fleet, is_merged
from tests.support.postgresql import Cluster, running_cluster

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.authority import Certificate

_NUMBERS: Final = itertools.count()
ADDRESS: Final = "127.0.0.1"


@dataclass
class TlsServer:
    """A server that lets nobody in from afar but with a certificate of its authority."""

    cluster: Cluster
    authority: Authority
    port: int

    def address(self, database: str, login: str, made: Certificate | None, root: Path) -> str:
        words = [f"host={ADDRESS} port={self.port} dbname={database} user={login}"]
        words.append(f"sslmode=verify-full sslrootcert={root}")
        if made is not None:
            words.append(f"sslcert={made.certificate} sslkey={made.key}")
        return " ".join(words)


@dataclass
class FleetByTls(Fleet):
    """A fleet whose hosts and operators reach it over TLS; its owner is on the server."""

    server: TlsServer | None = None

    @property
    def name(self) -> str:
        return self.database.partition("dbname=")[2]

    def address_of(self, login: str) -> str:
        assert self.server is not None
        made = self.server.authority.certificate(login)
        root = self.server.authority.root.certificate
        return self.server.address(self.name, login, made, root)


@contextmanager
def running_tls_server(directory: Path) -> Iterator[TlsServer]:
    authority = Authority(directory / "authority")
    made = authority.certificate("server", f"subjectAltName=IP:{ADDRESS}")
    with socket.socket() as one:
        one.bind((ADDRESS, 0))
        port = one.getsockname()[1]
    files = {
        "ssl_cert_file": made.certificate,
        "ssl_key_file": made.key,
        "ssl_ca_file": authority.root.certificate,
    }
    for_server = _owned_by_server(directory, files)
    settings = {"listen_addresses": ADDRESS, "port": str(port), "ssl": "on", **for_server}
    rules = f"local all all trust\nhostssl all all {ADDRESS}/32 cert"
    with running_cluster(settings, rules) as cluster:
        yield TlsServer(cluster, authority, port)


def _owned_by_server(directory: Path, files: dict[str, Path]) -> dict[str, str]:
    """Copies that the server may read, and nobody else."""
    place = directory / "server"
    place.mkdir()
    copies = {name: place / file.name for name, file in files.items()}
    user = pwd.getpwnam("postgres")
    for name, copy in copies.items():
        shutil.copy(files[name], copy)
        copy.chmod(stat.S_IRUSR)
        if os.geteuid() == 0:
            os.chown(copy, user.pw_uid, user.pw_gid)
    return {name: str(copy) for name, copy in copies.items()}


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsServer]:
    directory = tmp_path_factory.mktemp("tls")
    for parent in (directory, *directory.parents):
        # Below what pytest makes for its user alone.
        if parent.stat().st_uid == os.geteuid() and not parent.stat().st_mode & stat.S_IXOTH:
            parent.chmod(parent.stat().st_mode | stat.S_IXOTH)
    with running_tls_server(directory) as server:
        yield server


@pytest.fixture
def tls_fleet(tls_server: TlsServer, tmp_path: Path) -> Iterator[FleetByTls]:
    database = tls_server.cluster.new_database(f"tls{next(_NUMBERS)}")
    found = FleetByTls(tls_server.cluster, database, tmp_path, server=tls_server)
    found.set_up()
    try:
        yield found
    finally:
        found.close()


def test_only_who_has_a_certificate_of_its_own_comes_in(
    tls_fleet: FleetByTls, tls_server: TlsServer, tmp_path: Path
) -> None:
    host = tls_fleet.host("k1")
    tls_fleet.host("k2")
    top = host.chain("a")
    (job,) = tls_fleet.submit(host.planned(top))
    assert host.start("--once").wait(60) == 0
    assert tls_fleet.outcomes() == {job: "done"}
    assert is_merged(top)

    root = tls_server.authority.root.certificate
    own = tls_server.authority.certificate("host-k1")
    stranger = Authority(tmp_path / "stranger")
    false = stranger.certificate("host-k1")
    known = tls_server.address(tls_fleet.name, "host-k1", own, root)
    for odd in (
        tls_server.address(tls_fleet.name, "host-k2", own, root),
        tls_server.address(tls_fleet.name, "operator", own, root),
        tls_server.address(tls_fleet.name, "owner", own, root),
        tls_server.address(tls_fleet.name, "host-k1", None, root),
        tls_server.address(tls_fleet.name, "host-k1", false, root),
        tls_server.address(tls_fleet.name, "host-k1", own, stranger.root.certificate),
        known.replace("verify-full", "disable"),
        known.replace(ADDRESS, "localhost"),
    ):
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(odd).close()
        config = host.directory / "odd.toml"
        config.write_text(host.config.read_text().replace(known, odd))
        ran = chainmerge("fleet", "status", "--config", config)
        assert ran.status == 1
        assert "the database of the fleet" in ran.err
    psycopg.connect(known).close()

    # What a thief has is worth nothing once the login is barred.
    tls_fleet.execute('ALTER ROLE "host-k1" NOLOGIN')
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(known).close()


FORBIDDEN: Final = (
    "CREATE TABLE mine (a int)",
    "CREATE TABLE public.mine (a int)",
    "CREATE TEMP TABLE mine (a int)",
    "CREATE SCHEMA mine",
    "CREATE FUNCTION public.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE OR REPLACE FUNCTION queues_of_login() RETURNS SETOF text LANGUAGE sql AS 'SELECT 1'",
    "CREATE ROLE mine",
    "ALTER TABLE procrastinate_jobs DISABLE ROW LEVEL SECURITY",
    "DROP POLICY changed_by_host ON procrastinate_jobs",
    "DROP TABLE leases",
    "TRUNCATE results",
    "SET ROLE chainmerge_operator",
    "SET SESSION AUTHORIZATION operator",
    "COPY leases TO PROGRAM 'true'",
    "INSERT INTO procrastinate_jobs (queue_name, task_name) VALUES ('host.h1', 'x')",
    "UPDATE procrastinate_jobs SET args = '{}'",
    "UPDATE procrastinate_jobs SET queueing_lock = NULL",
    "DELETE FROM procrastinate_jobs",
    "SELECT * FROM leases",
    "DELETE FROM leases",
    "SELECT * FROM results",
    "INSERT INTO limits VALUES ('fleet', 1000)",
    "INSERT INTO wishes VALUES (1)",
    "UPDATE hosts SET drained = true",
    "SELECT put_back('h2', 1)",
    "SELECT end_job('h2', 1, 'done', 0, NULL, '', NULL)",
    "SELECT take_leases('h2', '[]')",
    "SELECT * FROM speak('h2', '{}', '{}', '{}', '{}')",
    "SELECT seek_domain('h2', 1, 'x')",
    "SELECT run_here('h2', '{x}')",
)


def asked(connection: psycopg.Connection[Any], statement: str) -> list[tuple[Any, ...]]:
    return connection.execute(statement.encode()).fetchall()


def test_what_a_stolen_login_of_a_host_can_do(tls_fleet: FleetByTls) -> None:
    first, second = (tls_fleet.host(name) for name in ("h1", "h2"))
    tls_fleet.register(first, second)
    mine, theirs = tls_fleet.submit(
        first.planned(first.chain("a")), second.planned(second.chain("b"))
    )
    with psycopg.connect(tls_fleet.address_of("host-h1"), autocommit=True) as connection:
        connection.execute("SET search_path = chainmerge")
        for statement in FORBIDDEN:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement.encode())

        # It sees and changes the jobs of its own host alone.
        assert asked(connection, "SELECT id FROM procrastinate_jobs") == [(mine,)]
        for change in ("status = 'cancelled'", "queue_name = 'host.h1'", "priority = 1000"):
            changed = connection.execute(
                f"UPDATE procrastinate_jobs SET {change} WHERE id = {theirs}".encode()
            )
            assert changed.rowcount == 0
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("UPDATE procrastinate_jobs SET queue_name = 'host.h2'")

        # It has no say in what others do, and holds no key but those of its own jobs.
        for name in ("h2", "h3"):
            assert asked(connection, f"SELECT register_host('{name}', 'x', '')") != [("",)]
        connection.execute("SELECT register_host('h1', 'x', '')")
        for job, key in ((theirs, "fleet"), (mine, "host/h2"), (mine, "storage/nfs")):
            candidate = f'[{{"job": {job}, "keys": ["{key}"]}}]'
            assert asked(connection, f"SELECT take_leases('h1', '{candidate}')") == []
        connection.execute(f"SELECT end_job('h1', {theirs}, 'done', 0, NULL, '', NULL)".encode())
        assert tls_fleet.outcomes() == {}

        # It can lie about its own.
        connection.execute(f"SELECT end_job('h1', {mine}, 'done', 0, NULL, '', NULL)".encode())
        assert tls_fleet.outcomes() == {mine: "done"}
    assert second.start("--once").wait(60) == 0
    assert tls_fleet.outcomes() == {mine: "done", theirs: "done"}


def test_what_follows_a_domain_is_on_one_queue_and_only_its_host_hands_it_on(
    tls_fleet: FleetByTls,
) -> None:
    for name in ("h1", "h2"):
        assert tls_fleet.host(name).start("--once").wait(60) == 0
    rows = {
        (queue, action): f"INSERT INTO procrastinate_jobs (queue_name, task_name, args, status)"
        f" VALUES ('host.{queue}', 'chainmerge.fleet',"
        f' \'{{"record": {{"action": "{action}", "keys": []}}}}\', \'doing\') RETURNING id'
        for queue in ("h1", "h2")
        for action in ("merge", "live-merge")
    }
    jobs = {key: tls_fleet.ask(row)[0][0] for key, row in rows.items()}
    with psycopg.connect(tls_fleet.address_of("host-h1"), autocommit=True) as connection:
        connection.execute("SET search_path = chainmerge")

        def handed_on(job: int, host: str) -> None:
            asked(connection, f"SELECT procrastinate_retry_job_v2({job}, now(), 0, '{host}', NULL)")

        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            handed_on(jobs["h1", "merge"], "host.h2")
        for action in ("merge", "live-merge"):
            with pytest.raises(psycopg.errors.RaiseException):
                handed_on(jobs["h2", action], "host.h1")
        job = jobs["h1", "live-merge"]
        handed_on(job, "host.h2")
        # From then on it is the other one's, whatever its old host says.
        with pytest.raises(psycopg.errors.RaiseException):
            handed_on(job, "host.h1")
        with pytest.raises(psycopg.errors.RaiseException):
            asked(connection, f"SELECT procrastinate_finish_job_v1({job}, 'succeeded', false)")
        assert asked(
            connection, "SELECT id FROM procrastinate_fetch_job_v2('{host.h2}', NULL)"
        ) == [(None,)]
        asked(connection, f"SELECT end_job('h1', {job}, 'done', 0, NULL, '', NULL)")
        candidate = f'[{{"job": {job}, "keys": ["fleet"]}}]'
        assert asked(connection, f"SELECT take_leases('h1', '{candidate}')") == []
    where = "SELECT queue_name, status::text FROM procrastinate_jobs WHERE id = %s"
    assert tls_fleet.ask(where, job) == [("host.h2", "todo")]
    assert tls_fleet.ask("SELECT FROM results") == []
    assert tls_fleet.running() == []
