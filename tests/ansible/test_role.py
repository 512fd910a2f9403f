# SPDX-License-Identifier: Apache-2.0
"""The Ansible role, run by Ansible on this host: its check mode is the plan."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.support.cli import Ran, environment
from tests.support.images import MIB
from tests.support.operating import chain, installed
from tests.support.qemu import content, create

if TYPE_CHECKING:
    from collections.abc import Callable

ANSIBLE: Final = Path(__file__).parents[2] / "contrib" / "ansible"


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., Ran]:
    """Runs the playbook for an image."""
    program = installed(tmp_path / "bin") / "chainmerge"

    def run(top: Path, *arguments: str) -> Ran:
        ran = subprocess.run(
            [
                *("ansible-playbook", "-i", "localhost,", "-c", "local", ANSIBLE / "merge.yml"),
                *("-e", f"chainmerge_top={top}", "-e", f"chainmerge_program={program}"),
                *("-e", "ansible_python_interpreter=/usr/bin/python3", *arguments),
            ],
            capture_output=True,
            text=True,
            check=False,
            env=environment(
                ANSIBLE_ROLES_PATH=str(ANSIBLE / "roles"),
                ANSIBLE_NOCOLOR="1",
                ANSIBLE_HOME=str(tmp_path / "home"),
                ANSIBLE_LOCALHOST_WARNING="0",
                PYTHONPATH="",
                LC_ALL="C.UTF-8",
            ),
        )
        return Ran(ran.returncode, ran.stdout, ran.stderr)

    return run


def changes(ran: Ran) -> int:
    assert ran.status == 0, ran.out + ran.err
    (count,) = re.findall(r"changed=(\d+)", ran.out)
    return int(count)


def test_the_playbook_is_one(play: Callable[..., Ran], tmp_path: Path) -> None:
    assert play(tmp_path, "--syntax-check").status == 0


def test_check_mode_says_what_would_change(play: Callable[..., Ran], tmp_path: Path) -> None:
    base, top = chain(tmp_path, ("base", "top"))
    before = [base.read_bytes(), top.read_bytes()]
    ran = play(top, "--check")
    assert changes(ran) == 1
    assert f'"into": "{base}"' in ran.out
    assert [base.read_bytes(), top.read_bytes()] == before


@pytest.mark.parametrize("delete", [False, True])
def test_it_merges_once(play: Callable[..., Ran], tmp_path: Path, delete: bool) -> None:
    base, top, active = chain(tmp_path, ("base", "snap", "active"))
    shown = content(active)
    options = ["-e", '{"chainmerge_options": ["--delete"]}'] if delete else []
    assert changes(play(top, *options)) == 1
    assert top.exists() is not delete
    assert changes(play(top, *options)) == 0
    assert content(active) == shown
    assert base.exists()


def test_a_refusal_stops_it_before_anything_changes(
    play: Callable[..., Ran], tmp_path: Path
) -> None:
    alone = create(tmp_path / "alone.qcow2", MIB)
    for arguments in ([], ["--check"]):
        ran = play(alone, *arguments)
        assert ran.status != 0
        assert "has no backing file" in ran.out
    missing = play(tmp_path / "missing.qcow2")
    assert missing.status != 0
    assert "no such file" in missing.out
