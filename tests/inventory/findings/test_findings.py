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
