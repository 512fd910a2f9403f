# SPDX-License-Identifier: Apache-2.0
"""Operators that are two, that have no name, or that mistype: each hears a sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import psycopg
import pytest

from chainmerge.fleet import engine
from chainmerge.fleet.scan_requests import _queued
from tests.support.cli import COMMAND, environment
from tests.support.fleet import wait_until
from tests.support.fleet_actions import overlay_on

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.fleet import Fleet

NOBODY: Final = 54_321
"""A user without a name."""
NAMES: Final = ("LOGNAME", "USER", "LNAME", "USERNAME")


def started(fleet: Fleet, *words: str | Path) -> subprocess.Popen[str]:
    command = [*COMMAND, "fleet", str(words[0]), "--config", str(fleet.operators)]
    return subprocess.Popen(
        [*command, *map(str, words[1:])],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_that_ask_for_a_scan_at_the_same_time(fleet: Fleet) -> None:
    assert fleet.host("h1", connect='""').start("--once").wait(60) == 0
    both = [started(fleet, "scan") for _ in range(2)]
    ended = [one.communicate() for one in both]
    assert [one.returncode for one in both] == [0, 0], ended
    assert fleet.ask("SELECT count(*) FROM procrastinate_jobs") == [(1,)]


def test_what_is_queued_beside_our_own_locks_is_told_in_a_sentence(fleet: Fleet) -> None:
    assert fleet.host("h1", connect='""').start("--once").wait(60) == 0
    options = "-c search_path=chainmerge"
    with psycopg.connect(fleet.address_of("operator"), options=options) as connection:
        engine.submit(connection, [_queued("h1")])
        another = started(fleet, "scan")
        wait_until(lambda: fleet.ask("SELECT FROM pg_locks WHERE NOT granted"), "who waits")
        connection.commit()
    _, said = another.communicate()
    assert another.returncode == 1
    assert "duplicate key" in said
    assert "internal" not in said


def test_a_scan_that_was_interrupted_waits_again(fleet: Fleet) -> None:
    assert fleet.host("h1", connect='""').start("--once").wait(60) == 0
    (job,) = fleet.did("scan")["jobs"]
    fleet.execute(f"INSERT INTO leases (job, key, host) VALUES ({job}, 'scan/h1', 'h1')")
    assert fleet.did("scan")["jobs"] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes nobody")
@pytest.mark.parametrize(("name", "said"), [({}, f"{NOBODY}@"), ({"USER": "j\udcff"}, "j\\udcff@")])
def test_whoever_submits_needs_no_name(name: dict[str, str], said: str) -> None:
    without = {key: text for key, text in environment().items() if key not in NAMES}
    question = "from chainmerge.fleet.operating import submission; print(submission().by)"
    words = ["setpriv", f"--reuid={NOBODY}", "--clear-groups", sys.executable, "-c", question]
    ran = subprocess.run(
        words, env={**without, **name}, capture_output=True, text=True, check=False
    )
    assert ran.stdout.startswith(said), ran.stderr


@pytest.mark.parametrize("field", ["top", "vm"])
def test_what_the_database_does_not_take_is_no_plan(fleet: Fleet, field: str) -> None:
    host = fleet.host("h1", connect='""')
    plan = host.planned(host.chain("a"))
    (job,) = plan["jobs"]
    figures = {"images": 2, "hidden_bytes": 0, "bytes_to_copy": 0, "free_bytes": None}
    job["figures"] = {**figures, "vm": "v\0" if field == "vm" else "v"}
    job["disks"][0]["top"] += "\0" if field == "top" else ""
    file = fleet.directory / "odd.json"
    file.write_text(json.dumps(plan))
    ran = fleet.run("submit", file)
    assert ran.status == 2, ran.err
    assert "internal" not in ran.err


def test_who_ends_a_pause_as_it_is_told_has_the_limit_of_before(fleet: Fleet) -> None:
    fleet.did("limit", "storage/nfs", "4")
    fleet.did("limit", "host/h2", "0")
    for key, most in (("storage/nfs", 4), ("fleet", 100_000), ("host/h1", 1), ("host/h2", 1)):
        (said,) = fleet.did("pause", key)["done"]
        words = said.split("`")[1].split()
        assert words[:3] == ["chainmerge", "fleet", "limit"]
        fleet.did(*words[2:])
        assert fleet.ask("SELECT most, paused FROM limits WHERE key = %s", key) == [(most, False)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("pause", ""), "is no key"),
        (("limit", "storage nfs", "3"), "is no key"),
        (("plan", "--window", "25:00-1:00"), "22:00-05:00"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    fleet: Fleet, words: tuple[str, ...], said: str
) -> None:
    ran = fleet.run(*words)
    assert ran.status == 2
    assert said in ran.err


def test_nothing_is_older_than_all_times(fleet: Fleet) -> None:
    assert fleet.did("forget", "--older", "99999999999d")["jobs"] == []


def test_of_many_images_that_a_job_waits_for_one_is_named(fleet: Fleet) -> None:
    host = fleet.host("h1", connect='""')
    assert host.start("--once").wait(60) == 0
    plan = host.planned(overlay_on(host.chain("a"), host.images / "a.leaf"))
    (job,) = fleet.submit(plan)
    keys = [key for key in plan["jobs"][0]["keys"] if key.startswith("image/")]
    for held in range(1, 4):
        key = keys[held - 1]
        fleet.execute(f"INSERT INTO leases (job, key, host) VALUES ({job + 1}, '{key}', 'h2')")
        (waiting,) = fleet.did("status")["jobs"]
        more = ("", " and 1 more image", " and 2 more images")[held - 1]
        assert waiting["waits_for"] == [f"{keys[0]} (1 of 1){more}"]
