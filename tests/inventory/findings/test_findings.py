# SPDX-License-Identifier: Apache-2.0
"""Everything that is wrong is found, and nothing that is not: one test for each situation."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import Final

import click
import pytest

import chainmerge
from chainmerge import Severity
from chainmerge.catalogue import FINDINGS, explain
from chainmerge.cli import main
from tests.inventory.findings import zoo
from tests.inventory.findings.situations import SITUATIONS, Situation
from tests.support.cli import chainmerge as cli

DOCUMENTED: Final = Path(__file__).parents[3] / "docs" / "scan.md"
# What has a test of its own, as it needs more than files.
ELSEWHERE: Final = frozenset({"device-filling"})


def parses(command: str) -> bool:
    """Whether the parser takes a command."""
    program, *words = shlex.split(command)
    assert program == "chainmerge"
    found: click.Command = main.cli
    while isinstance(found, click.Group):
        within = found.get_command(click.Context(found), words[0])
        assert within is not None, command
        found, words = within, words[1:]
    found.make_context(found.name, words)
    return True


@pytest.mark.parametrize("one", SITUATIONS, ids=lambda one: one.name)
def test_what_is_found(one: Situation, tmp_path: Path) -> None:
    home = tmp_path / "images"
    home.mkdir()
    one.build(home)
    domains = None if one.domains is None else one.domains(home)
    before = {file: file.stat().st_mtime_ns for file in home.rglob("*")}
    report = chainmerge.scan([home], options=one.options, domains=domains)
    found = Counter((finding.code, Path(finding.image).name) for finding in report.findings)
    assert found == dict.fromkeys(one.expected, 1), report.findings
    ranks = [finding.severity.rank for finding in report.findings]
    assert ranks == sorted(ranks, reverse=True)
    for finding in report.findings:
        assert finding.sentence.isprintable()
        assert Path(finding.image).name in finding.sentence
        assert explain(finding.code)
        assert finding.command is not None
        assert parses(finding.command)
    assert before == {file: file.stat().st_mtime_ns for file in home.rglob("*")}


def test_the_zoo_is_large_enough() -> None:
    assert zoo.__doc__
    assert len(SITUATIONS) >= 60
    assert sum(not one.expected for one in SITUATIONS) >= 20
    assert len({one.name for one in SITUATIONS}) == len(SITUATIONS)


@pytest.mark.parametrize("code", FINDINGS)
def test_each_finding_of_a_scan_is_there_twice(code: str) -> None:
    found = [image for one in SITUATIONS for this, image in one.expected if this == code]
    of_others = {
        "half-done-commit", "in-use", "kept-leaks", "lost-data", "wrong-refcounts",
    }  # fmt: skip
    assert len(found) >= 2 or code in ELSEWHERE | of_others


def test_severities_have_an_order() -> None:
    assert [one.rank for one in (Severity.INFO, Severity.WARNING, Severity.CRITICAL)] == [0, 1, 2]


# What a command leaves out on purpose: plans are looked at first, and questions are asked.
_DONE_BY: Final = {"plan": "merge", "repair": "repair --yes", "bitmaps repair": "bitmaps repair -y"}


@pytest.mark.parametrize(
    "name",
    [
        "a_long_chain", "hidden_data", "hidden_data_above_a_branch", "the_oldest_of_several",
        "formats_that_nobody_declares", "raw_bases_that_nobody_declares",
        "a_stale_bitmap", "a_bitmap_in_use", "a_gap", "a_gap_in_one_branch",
        "a_program_that_knows_no_bitmaps", "a_lost_directory_of_bitmaps",
        "a_lost_directory_of_an_overlay", "leaks", "leaks_of_an_overlay", "lost_refcounts",
        "both_marks", "marks_in_headers",
    ],
)  # fmt: skip
def test_the_command_mends_it(name: str, tmp_path: Path) -> None:
    (one,) = [one for one in SITUATIONS if one.name == name]
    home = tmp_path / "images"
    home.mkdir()
    one.build(home)
    for finding in chainmerge.scan([home], options=one.options).findings:
        assert finding.command is not None
        command = finding.command.removeprefix("chainmerge ").replace("check ", "repair ", 1)
        said = next((said for said in _DONE_BY if command.startswith(f"{said} ")), "")
        if said:
            command = _DONE_BY[said] + command.removeprefix(said)
        ran = cli(*shlex.split(command))
        assert ran.status == 0, (command, ran.out, ran.err)
    left = {finding.code for finding in chainmerge.scan([home], options=one.options).findings}
    assert left.isdisjoint(code for code, _ in one.expected), left
