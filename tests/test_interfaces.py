# SPDX-License-Identifier: Apache-2.0
"""What scripts of users rely on is what it was: JSON documents, error codes, exit statuses.

``interfaces.json`` beside this file says what that is. It changes together with the version and
the changelog, by ``python -m tests.test_interfaces`` and by nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest

from chainmerge.catalogue import known_errors
from chainmerge.cli.configuration_schema import schema_text
from chainmerge.errors import ExitCode
from chainmerge.report.schema import CONFIGURATION_SCHEMA, schema_files

ROOT: Final = Path(__file__).parents[1]
SCHEMAS: Final = ROOT / "docs" / "schema"
SNAPSHOT: Final = ROOT / "tests" / "interfaces.json"
RENEWAL: Final = (
    "if that is meant: raise the version (src/chainmerge/__about__.py), say in CHANGELOG.md what "
    "changes for users, and renew the snapshot by `PYTHONPATH=src python -m tests.test_interfaces`"
)
# What is for readers and not for programs.
_WORDS: Final = {"description", "title"}

Interfaces = dict[str, dict[str, str]]
"""By kind and name, what each of them is."""


def interfaces() -> Interfaces:
    """All that is promised: statuses, errors with their facts, the fields of each document."""
    return {
        "exit statuses": {code.name: str(code.value) for code in ExitCode},
        "errors": {
            code: f"exit {error.exit_code:d}: {', '.join(error.fact_types)}"
            for code, error in known_errors().items()
        },
        **{
            f"document {path.stem}": fields_of(json.loads(path.read_text()))
            for path in sorted(SCHEMAS.glob("*.json"))
        },
    }


def fields_of(schema: dict[str, Any]) -> dict[str, str]:
    """What a JSON schema allows, field by field, without the words that explain it."""
    found = {"": _plain({name: value for name, value in schema.items() if name != "$defs"})}
    for name, part in schema.get("$defs", {}).items():
        required = part.get("required", [])
        properties = part.get("properties", {})
        rest = {key: part[key] for key in part if key not in {"properties", "required"}}
        found[name] = _plain(rest)
        for field, value in properties.items():
            optional = "" if field in required else ", optional"
            found[f"{name}.{field}"] = _plain(value) + optional
    return found


def _plain(value: Any) -> str:
    return json.dumps(_without_words(value), sort_keys=True)


def _without_words(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_words(one)
            for key, one in value.items()
            if not (key in _WORDS and isinstance(one, str))
        }
    return [_without_words(one) for one in value] if isinstance(value, list) else value


def differences(before: Interfaces, now: Interfaces) -> list[str]:
    """What is gone, another, or new; a line each."""
    flat, flat_now = _flat(before), _flat(now)
    return [
        *(f"gone: {name}" for name in flat if name not in flat_now),
        *(
            f"another: {name}: {flat[name]} -> {value}"
            for name, value in flat_now.items()
            if name in flat and flat[name] != value
        ),
        *(f"new: {name}: {value}" for name, value in flat_now.items() if name not in flat),
    ]


def _flat(all_kinds: Interfaces) -> dict[str, str]:
    return {
        f"{kind} {name}".rstrip(): value
        for kind, several in all_kinds.items()
        for name, value in several.items()
    }


def load() -> Interfaces:
    found: Interfaces = json.loads(SNAPSHOT.read_text(encoding="ascii"))
    return found


def renew() -> None:
    """Write down what is promised from now on."""
    SNAPSHOT.write_text(json.dumps(interfaces(), indent=1) + "\n", encoding="ascii")


def test_interfaces_are_as_they_were() -> None:
    changes = differences(load(), interfaces())
    assert not changes, "\n".join([*changes, RENEWAL])


def test_the_documents_are_those_of_the_code() -> None:
    """Else the snapshot would be one of documents that nobody prints."""
    stored = {path.name: path.read_text() for path in SCHEMAS.glob("*.json")}
    assert stored == schema_files() | {CONFIGURATION_SCHEMA: schema_text()}, "make schema"


# Whether that can fail

KNOWN: Final[Interfaces] = {
    "exit statuses": {"DONE": "0", "FAILED": "1"},
    "errors": {"base-newer": "exit 3: base, top"},
    "document plan-1": {"Plan.base": '{"type": "string"}'},
}


@pytest.mark.parametrize(
    ("kind", "now", "said"),
    [
        ("exit statuses", {"DONE": "0"}, ["gone: exit statuses FAILED"]),
        (
            "exit statuses",
            {"DONE": "0", "FAILED": "5"},
            ["another: exit statuses FAILED: 1 -> 5"],
        ),
        (
            "errors",
            {"base-newer": "exit 3: base"},
            ["another: errors base-newer: exit 3: base, top -> exit 3: base"],
        ),
        (
            "errors",
            {"base-is-newer": "exit 3: base, top"},
            ["gone: errors base-newer", "new: errors base-is-newer: exit 3: base, top"],
        ),
        ("document plan-1", {}, ["gone: document plan-1 Plan.base"]),
    ],
)
def test_what_changes_is_named(kind: str, now: dict[str, str], said: list[str]) -> None:
    assert differences(KNOWN, {**KNOWN, kind: now}) == said
    assert differences(KNOWN, KNOWN) == []


def test_a_field_is_known_by_its_type_and_by_whether_it_has_to_be_there() -> None:
    plan: dict[str, Any] = {
        "type": "object",
        "title": "Plan",
        "properties": {
            "base": {"type": "string", "description": "Path of base."},
            "title": {"type": "integer", "default": 0},
        },
        "required": ["base"],
    }
    schema = {"$ref": "#/$defs/Plan", "$defs": {"Plan": plan}}
    assert fields_of(schema) == {
        "": '{"$ref": "#/$defs/Plan"}',
        "Plan": '{"type": "object"}',
        "Plan.base": '{"type": "string"}',
        "Plan.title": '{"default": 0, "type": "integer"}, optional',
    }


if __name__ == "__main__":
    renew()
