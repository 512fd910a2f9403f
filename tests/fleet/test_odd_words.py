# SPDX-License-Identifier: Apache-2.0
"""Whatever a host has written into the database: what operators ask for, they are told."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import psycopg
import pytest

from tests.support.cli import chainmerge

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.fleet import Fleet, Host

HUGE: Final = "9" * 400
LINES: Final = (
    '{"stage": 5, "done": true, "total": -7}',
    '{"stage": {"a": [1]}, "done": 1e999, "total": "x"}',
    '{"stage": "\\ud800\\u001b[31m", "done": -5, "total": 5}',
    f'{{"stage": "x", "done": {HUGE}, "total": {HUGE}}}',
    f'{{"stage": "{HUGE}", "done": 1, "total": 0}}',
    "[" * 16_000,
)
SCANS: Final = (
    {"scanned_at": -(2**62)},
    {"scanned_at": 2**62},
    {"occupied_bytes": int(HUGE)},
    {"left_out": ["\udcff"], "freed_bytes": int(HUGE)},
)


@contextmanager
def words_of(fleet: Fleet, host: Host) -> Iterator[psycopg.Connection[Any]]:
    """What a login of the host can say, once its worker has registered it."""
    assert host.start("--once").wait(60) == 0
    ((machine,),) = fleet.ask("SELECT machine_id FROM hosts WHERE host = %s", host.name)
    address = fleet.address_of(f"host-{host.name}")
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute("SET search_path = chainmerge")
        connection.execute("SELECT register_host(%s, %s, '')", (host.name, machine))
        yield connection


def is_all_told(fleet: Fleet) -> bool:
    page = fleet.directory / "fleet.html"
    commands: tuple[tuple[Any, ...], ...] = (
        ("status",),
        ("results",),
        ("metrics",),
        ("inventory",),
        ("report", "-o", page),
        ("status", "--json"),
        ("results", "--json"),
    )
    ran = {words: fleet.run(*words) for words in commands}
    assert {words: one.err for words, one in ran.items() if one.status != 0} == {}
    return True


@pytest.mark.parametrize("line", LINES)
def test_odd_progress(fleet: Fleet, line: str) -> None:
    host = fleet.host("h1", connect='""')
    with words_of(fleet, host) as connection:
        plan = host.planned(host.chain("a"))
        (job,) = fleet.submit(plan)
        candidate = json.dumps([{"job": job, "keys": plan["jobs"][0]["keys"]}])
        connection.execute("SELECT take_leases('h1', %s)", (candidate,))
        connection.execute("SELECT speak('h1', '{}', %s, %s, '{}')", ([job], [line]))
        assert is_all_told(fleet)
        (running,) = fleet.did("status")["jobs"]
        assert running["state"] == "running"


def test_an_outcome_that_is_none_is_unknown(fleet: Fleet) -> None:
    host = fleet.host("h1", connect='""')
    with words_of(fleet, host) as connection:
        (job,) = fleet.submit(host.planned(host.chain("a")))
        odd = (job, "splendid", -7, "\033", "\033[31m", "no json")
        connection.execute("SELECT end_job('h1', %s, %s, %s, %s, %s, %s)", odd)
    assert is_all_told(fleet)
    (result,) = fleet.did("results")["results"]
    assert result["outcome"] == "unknown"


@pytest.mark.parametrize("odd", SCANS)
def test_odd_scans(fleet: Fleet, odd: dict[str, Any]) -> None:
    host = fleet.host("h1", connect='""')
    with words_of(fleet, host) as connection:
        looked = chainmerge("fleet", "look", "--json", "--quiet", "--config", host.config)
        moment = odd.get("scanned_at", 1)
        connection.execute(
            "SELECT store_inventory('h1', %s, %s, %s, %s, %s)",
            (moment, json.dumps({**looked.json, **odd}), moment, moment, moment),
        )
    assert is_all_told(fleet)
    assert fleet.run("plan").status == 0
