# SPDX-License-Identifier: Apache-2.0
"""The connection to the fleet's database, and how the fleet is set up in it."""

from __future__ import annotations

from contextlib import contextmanager
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from chainmerge.fleet import engine
from chainmerge.fleet.errors import (
    FleetExtraMissing,
    FleetNewer,
    FleetNotSetUp,
    FleetUnreachable,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from psycopg import Connection

SCHEMA_VERSION: Final = "2"
_SCHEMA: Final = "chainmerge"
_SCRIPTS: Final = ("schema.sql", "inventory.sql")
_ROLES: Final = ("chainmerge_worker", "chainmerge_operator")
_CONNECT_TIMEOUT: Final = 5
"""Seconds that a server may take to answer at all."""


def require_extra() -> None:
    """Raise FleetExtraMissing unless what talks to the database is installed."""
    try:
        import psycopg  # noqa: F401, PLC0415
    except ImportError as error:
        raise FleetExtraMissing(str(error)) from error
    found = engine.version_here()
    if found != engine.ENGINE_VERSION:
        raise FleetExtraMissing(
            f"procrastinate {engine.ENGINE_VERSION} is needed, and {found or 'none'} is here"
        )


def address(database: str) -> str:
    """Return how libpq is told to reach the fleet in a database."""
    from psycopg.conninfo import make_conninfo  # noqa: PLC0415

    return make_conninfo(
        database,
        options=f"-c search_path={_SCHEMA}",
        connect_timeout=_CONNECT_TIMEOUT,
        application_name="chainmerge",
        keepalives_idle=30,
        keepalives_interval=10,
        keepalives_count=3,
        tcp_user_timeout=60_000,
    )


@contextmanager
def transaction(database: str) -> Iterator[Connection[Any]]:
    """Give a connection to a fleet that is set up; what is done by it is done at the end, or not.

    Raises:
        FleetExtraMissing: see :func:`require_extra`.
        FleetUnreachable: the database does not answer, or refuses a statement.
        FleetNotSetUp: it holds no fleet, or one of another version.
    """
    with _connected(database) as connection:
        require_set_up(connection)
        yield connection


@contextmanager
def _connected(database: str) -> Iterator[Connection[Any]]:
    require_extra()
    import psycopg  # noqa: PLC0415

    try:
        with psycopg.connect(address(database)) as connection:
            yield connection
    except psycopg.Error as error:
        raise FleetUnreachable(first_line(error)) from error


def first_line(error: BaseException) -> str:
    """What an error of the database says, without its context."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def require_set_up(connection: Connection[Any]) -> None:
    """Raise FleetNotSetUp unless the fleet in the database is of this version."""
    versions = _versions(connection)
    _require_not_newer(versions)
    missing = [
        f"{component} {version} is needed, and {found or 'none'} is there"
        for component, version, found in versions
        if found != version
    ]
    if missing:
        raise FleetNotSetUp("; ".join(missing))


def _require_not_newer(versions: Iterable[tuple[str, str, str | None]]) -> None:
    newer = [
        f"{component} {version} is needed, and {found} is there"
        for component, version, found in versions
        if found is not None and engine.version_order(found) > engine.version_order(version)
    ]
    if newer:
        raise FleetNewer("; ".join(newer))


def set_up(database: str) -> tuple[str, ...]:
    """Make all that a fleet needs in a database, or bring it to this version.

    It is all done, or nothing is. Returns what was changed, a sentence each.

    Raises:
        FleetNewer: a later version of the program has set it up.
    """
    with _connected(database) as connection:
        connection.execute("SELECT pg_advisory_xact_lock(hashtext('chainmerge-set-up'))")
        done = [*_made_roles(connection)]
        if not _is_there(connection, "SELECT to_regnamespace('chainmerge')"):
            connection.execute("CREATE SCHEMA chainmerge")
            done.append("the schema chainmerge is made")
        before = _versions(connection)
        _require_not_newer(before)
        for component, version, found in before:
            if component == "queue":
                engine.migrate(connection, found)
            if found != version:
                done.append(f"the {component} is of version {version}")
        for script in _SCRIPTS:
            connection.execute(resources.files("chainmerge.fleet").joinpath(script).read_bytes())
        for component, version, _ in before:
            connection.execute(
                "INSERT INTO installed VALUES (%s, %s)"
                " ON CONFLICT (component) DO UPDATE SET version = excluded.version",
                (component, version),
            )
    return tuple(done)


def _made_roles(connection: Connection[Any]) -> Iterator[str]:
    from psycopg import sql  # noqa: PLC0415

    for role in _ROLES:
        known = connection.execute("SELECT FROM pg_roles WHERE rolname = %s", (role,)).fetchone()
        if known is None:
            connection.execute(sql.SQL("CREATE ROLE {} NOLOGIN").format(sql.Identifier(role)))
            yield f"the role {role} is made"


def _versions(connection: Connection[Any]) -> list[tuple[str, str, str | None]]:
    """What belongs to a fleet, in which version it is needed and in which it is there."""
    needed = {"queue": engine.ENGINE_VERSION, "fleet": SCHEMA_VERSION}
    found: dict[str, str] = {}
    if _is_there(connection, "SELECT to_regclass('chainmerge.installed')"):
        found = dict(connection.execute("SELECT component, version FROM installed").fetchall())
    return [(component, version, found.get(component)) for component, version in needed.items()]


def _is_there(connection: Connection[Any], question: Any) -> bool:
    row = connection.execute(question).fetchone()
    return row is not None and row[0] is not None
