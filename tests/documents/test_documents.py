# SPDX-License-Identifier: Apache-2.0
"""What functions return: values that nobody can change, and what they say of themselves."""

from __future__ import annotations

import importlib
import pkgutil
from itertools import combinations
from typing import Final

import pytest
from msgspec import Struct, structs

from chainmerge import documents
from chainmerge.documents.disks import DiskOutcome, DiskReport, DisksPlan, DisksReport
from chainmerge.documents.images import CheckResult, Searched
from chainmerge.documents.plan import Finding
from chainmerge.errors import ExitCode
from tests.support import reports

RECORDS: Final = [
    value
    for module in pkgutil.iter_modules(documents.__path__, f"{documents.__name__}.")
    for value in vars(importlib.import_module(module.name)).values()
    if isinstance(value, type) and issubclass(value, Struct) and value.__module__ == module.name
]


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_cannot_be_changed(record: type[Struct]) -> None:
    assert record.__struct_config__.frozen
    assert not record.__dictoffset__


def test_there_are_records() -> None:
    assert len(RECORDS) > 20


@pytest.mark.parametrize(
    ("searched", "places", "is_vouched_for"),
    [
        pytest.param(Searched(), "", False, id="nowhere"),
        pytest.param(Searched(directories=("/a", "/b")), "/a, /b", False, id="directories"),
        pytest.param(
            Searched(directories=("/a",), named=("/c", "/d")),
            "/a, /c, /d with everything below",
            True,
            id="named",
        ),
        pytest.param(
            Searched(directories=("/a",), around=("/", "/e")),
            "/a, up to 3 levels below /, /e",
            False,
            id="around",
        ),
        pytest.param(Searched(sole_user=True), "", True, id="no others, says the caller"),
        pytest.param(Searched(active="/a/top"), "", False, id="active"),
    ],
)
def test_where_was_searched(searched: Searched, places: str, is_vouched_for: bool) -> None:
    assert searched.places == places
    assert searched.is_vouched_for == is_vouched_for


SOUND: Final = CheckResult(1, "image", 0, 0, (), 65536)


@pytest.mark.parametrize(
    ("differs", "clean"),
    [({}, True), ({"corruptions": 1}, False), ({"leaks": 1}, False), ({"remarks": ("x",)}, False)],
)
def test_an_image_is_clean_if_nothing_is_wrong(differs: dict[str, int], clean: bool) -> None:
    assert structs.replace(SOUND, **differs).clean == clean


def report_of(*outcomes: DiskOutcome) -> DisksReport:
    return DisksReport(1, tuple(DiskReport("top", "base", outcome) for outcome in outcomes))


EXIT_CODES: Final = {
    DiskOutcome.UNKNOWN: ExitCode.UNKNOWN,
    DiskOutcome.FAILED: ExitCode.FAILED,
    DiskOutcome.INTERRUPTED: ExitCode.INTERRUPTED,
    DiskOutcome.NOT_BEGUN: ExitCode.INTERRUPTED,
    DiskOutcome.MERGED: ExitCode.DONE,
    DiskOutcome.ALREADY_MERGED: ExitCode.DONE,
}
"""From the worst on."""


@pytest.mark.parametrize("outcome", EXIT_CODES)
def test_the_exit_code_of_one_disk(outcome: DiskOutcome) -> None:
    report = report_of(outcome)
    assert report.exit_code is EXIT_CODES[outcome]
    assert report.disks[0].is_done == (report.exit_code is ExitCode.DONE)


def test_the_exit_code_of_several_disks_is_that_of_the_worst() -> None:
    for worse, better in combinations(EXIT_CODES, 2):
        assert report_of(better, worse).exit_code is EXIT_CODES[worse]


def test_several_disks_can_be_merged_if_each_can_and_nothing_else_keeps_them() -> None:
    finding = Finding("base-newer", "it is newer", "look at it")
    fine = structs.replace(reports.plan(), refusals=())
    refused = structs.replace(fine, refusals=(finding,))
    assert DisksPlan(1, (fine, fine), ()).feasible
    assert not DisksPlan(1, (fine, refused), ()).feasible
    assert not DisksPlan(1, (fine, fine), (finding,)).feasible
