# SPDX-License-Identifier: Apache-2.0
"""What needs no database: where images may lie, and what a child's last words mean."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest

from chainmerge.fleet.outcome import ending_of
from chainmerge.fleet.places import require_allowed, why_not_locked
from chainmerge.fleet.record import RecordUnusable
from chainmerge.fleet.settings import FleetSettings, HostSettings
from tests.support.cli import environment

if TYPE_CHECKING:
    from pathlib import Path

MOUNT: Final = "36 25 0:31 / {point} rw,relatime - {kind} server:/x rw,vers=3{options}"


@pytest.mark.parametrize(
    ("kind", "options", "refused"),
    [
        ("nfs", ",nolock", True),
        ("nfs", ",local_lock=all", True),
        ("nfs4", ",local_lock=flock", True),
        ("nfs4", ",local_lock=none", False),
        ("nfs", "", False),
        ("ext4", ",nolock", False),
    ],
)
def test_nfs_without_locks_is_seen(tmp_path: Path, kind: str, options: str, refused: bool) -> None:
    table = tmp_path / "mountinfo"
    root = MOUNT.format(point="/", kind="nfs", options=",nolock")
    table.write_text(f"{root}\n{MOUNT.format(point='/srv', kind=kind, options=options)}\n")
    assert bool(why_not_locked("/srv/disk", table)) is refused
    assert why_not_locked("/srv2/disk", table), "that is on the root"


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/dev/vms/disk", True),
        ("/dev/vms/../sda", False),
        ("/dev/other/disk", False),
        ("/dev/vms/-disk", False),
        ("/images/a", True),
        ("/images", False),
        ("/images2/a", False),
        ("/images//a", False),
        ("/images/a\n", False),
        ("images/a", False),
    ],
)
def test_only_named_places_are_allowed(path: str, allowed: bool) -> None:
    fleet = FleetSettings(database="x", directories=("/images",), volume_groups=("vms",))
    host = HostSettings("h1", "0" * 32, fleet)
    if allowed:
        require_allowed(path, host)
    else:
        with pytest.raises(RecordUnusable):
            require_allowed(path, host)


REPORT: Final = json.dumps({"event": "report", "outcome": "merged"})
AGAIN: Final = json.dumps({"event": "report", "outcome": "already-merged"})
ERROR: Final = json.dumps({"event": "error", "code": "image-locked", "message": "it is"})
STOPPED: Final = json.dumps({"event": "error", "code": "interrupted", "message": "stopped"})
PROGRESS: Final = json.dumps({"event": "progress", "stage": "copy"})


@pytest.mark.parametrize(
    ("lines", "status", "outcome"),
    [
        ([PROGRESS, REPORT], 0, "done"),
        ([REPORT], None, "done"),
        ([REPORT], -9, "done"),
        ([AGAIN], 0, "already"),
        ([ERROR], 3, "refused"),
        ([ERROR], 1, "failed"),
        ([ERROR], 4, "unknown"),
        ([ERROR], None, None),
        ([STOPPED], 130, None),
        ([PROGRESS], -9, None),
        ([PROGRESS, REPORT[:-3]], -9, None),
        ([REPORT, "[" * 100_000], 0, "done"),
        ([], 1, None),
    ],
)
def test_last_words(lines: list[str], status: int | None, outcome: str | None) -> None:
    ending = ending_of(lines, status)
    assert (ending and ending.outcome.value) == outcome


def test_without_the_extra_a_sentence_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['procrastinate'] = None\n"
        "from chainmerge.cli.main import run\n"
        "sys.exit(run(['fleet', 'status']))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, check=False
    )
    assert ran.returncode == 2
    assert b"pip install 'chainmerge[fleet]'" in ran.stderr


def test_nothing_else_imports_what_the_extra_installs() -> None:
    script = (
        "import sys, chainmerge.catalogue, chainmerge.api, chainmerge.cli.main\n"
        "chainmerge.catalogue.known_errors()\n"
        "print(sorted({'procrastinate', 'psycopg', 'asyncpg'} & set(sys.modules)))"
    )
    printed = subprocess.check_output([sys.executable, "-c", script], env=environment())
    assert printed == b"[]\n"
