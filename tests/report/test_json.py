# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainmerge.cli.configuration_schema import schema_text
from chainmerge.documents.merge import MergeReport
from chainmerge.documents.plan import MergePlan
from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.errors import Refused
from chainmerge.report import schema
from chainmerge.report.json import encode, encode_error, encode_event
from tests.support import reports

SCHEMAS = Path(__file__).parents[2] / "docs" / "schema"


@dataclass(eq=False)
class Example(Refused):
    code: ClassVar[str] = "example"
    template: ClassVar[str] = "{image} lacks {missing} bytes"
    hint: ClassVar[str] = "add {missing}"
    image: str
    missing: int
    where: Path


@given(st.text(st.characters(exclude_categories=())))
def test_any_name_goes_through_json_unharmed(name: str) -> None:
    line = encode(reports.plan(name=name))
    assert line.isascii()
    assert "\n" not in line
    assert json.loads(line)["bitmaps"][0]["name"] == name


def test_undecodable_bytes_can_be_had_back() -> None:
    raw = b"caf\xe9.qcow2"
    read = json.loads(encode(reports.plan(base=os.fsdecode(raw))))
    assert os.fsencode(read["base"]) == raw


def test_mappings_are_sorted_and_fields_are_not() -> None:
    one, two = {"b": 1, "a": 2}, {"a": 2, "b": 1}
    assert encode(one) == encode(two) == '{"a": 2, "b": 1}'
    assert list(json.loads(encode(reports.plan())))[:3] == ["version", "base", "top"]


def test_plans_and_reports_can_be_read_back() -> None:
    plan = reports.plan()
    report = reports.merge_report(plan)
    assert msgspec.json.decode(encode(plan), type=MergePlan) == plan
    assert msgspec.json.decode(encode(report), type=MergeReport) == report


def test_events_say_first_what_they_are() -> None:
    line = encode_event("progress", ProgressEvent(Stage.COPY, 5, 10))
    assert line == (
        '{"event": "progress", "stage": "copy", "done": 5, "total": 10, "rate": 0, "top": ""}'
    )


def test_errors_carry_their_facts() -> None:
    error = json.loads(encode_error(Example("a.qcow2", 7, Path("/x"))))
    assert error == {
        "event": "error",
        "code": "example",
        "message": "a.qcow2 lacks 7 bytes",
        "hint": "add 7",
        "facts": {"image": "a.qcow2", "missing": 7, "where": "/x"},
    }


def test_schemas_in_the_documentation_are_up_to_date() -> None:
    stored = {path.name: path.read_text(encoding="ascii") for path in SCHEMAS.glob("*.json")}
    written = schema.schema_files() | {schema.CONFIGURATION_SCHEMA: schema_text()}
    assert stored == written, "run `make schema`"


@pytest.mark.parametrize("document", schema.DOCUMENTS.values())
def test_every_field_of_a_report_has_its_place_in_the_schema(document: type) -> None:
    described = schema.schema_of(document)["$defs"][document.__name__]
    fields = [name for name in described["properties"] if name != "event"]
    assert fields == list(document.__struct_fields__)  # type: ignore[attr-defined]
