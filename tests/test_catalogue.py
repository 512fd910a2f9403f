# SPDX-License-Identifier: Apache-2.0
"""Every error of the package: that its words are in order."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, Final

import pytest

from chainmerge import catalogue, errors
from chainmerge.documents.repair import RepairFinding
from chainmerge.errors import (
    ChainmergeError,
    Failed,
    Interrupted,
    Misuse,
    OutcomeUnknown,
    Refused,
    all_errors,
)
from tests.support.cli import chainmerge

ERRORS = catalogue.known_errors()

# A fact of each type that an error may declare.
_EXAMPLES: Final[dict[str, Any]] = {"str": "text", "int": 7, "float": 1.5}


def example_of(error: type[ChainmergeError]) -> ChainmergeError:
    return error(*(_EXAMPLES[kind.partition(" | ")[0]] for kind in error.fact_types.values()))


def test_codes_are_unique() -> None:
    ours = (error for error in all_errors() if error.__module__.startswith("chainmerge."))
    counted = Counter(error.code for error in ours)
    assert [code for code, number in counted.items() if number > 1] == []


@pytest.mark.parametrize("code", ERRORS)
def test_words_of_an_error_are_in_order(code: str) -> None:
    error = ERRORS[code]
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code)
    assert len(error.explanation) > 80, "an explanation says more than the sentence"
    assert error.hint, "every error says what to do"
    example = example_of(error)
    for text in (example.sentence, example.advice):
        assert text
        # One line each: what a name holds is escaped, and so would a newline of ours be.
        assert text.isprintable()


@pytest.mark.parametrize("code", ERRORS)
def test_every_error_explains_itself(code: str) -> None:
    text = catalogue.explain(code)
    assert text.startswith(f"{code} (exit status {ERRORS[code].exit_code:d}, ")
    assert "What to do: " in text
    assert all(paragraph.isprintable() for paragraph in text.split("\n\n"))


KINDS: Final = (Failed, Misuse, Refused, OutcomeUnknown, Interrupted)
FAMILIES: Final = tuple(
    one
    for one in vars(errors).values()
    if isinstance(one, type)
    and issubclass(one, ChainmergeError)
    and one not in (ChainmergeError, *KINDS)
)


@pytest.mark.parametrize("code", ERRORS)
def test_an_error_is_of_one_kind_and_of_one_family_at_most(code: str) -> None:
    assert sum(issubclass(ERRORS[code], kind) for kind in KINDS) == 1
    assert sum(issubclass(ERRORS[code], family) for family in FAMILIES) <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_to_be_caught(family: type[ChainmergeError]) -> None:
    members = [error for error in ERRORS.values() if issubclass(error, family)]
    assert len(members) > 1
    for member in members:
        with pytest.raises(family):
            raise example_of(member)


@pytest.mark.parametrize("code", catalogue.FINDINGS)
def test_words_of_a_finding_are_in_order(code: str) -> None:
    subject = catalogue.FINDINGS[code]
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", code)
    assert code not in ERRORS
    assert len(subject.explanation) > 80
    assert all(one.isprintable() for one in subject.text.split("\n\n"))


def test_every_kind_of_finding_is_explained() -> None:
    """The documentation of the record lists the kinds that reports have."""
    listed = (RepairFinding.__doc__ or "").partition("kind:")[2].partition("or the code")[0]
    kinds = set(re.findall(r"``([a-z-]+)``", listed))
    assert len(kinds) > 10
    assert kinds <= set(catalogue.FINDINGS)


def test_explain_prints_the_long_form() -> None:
    ran = chainmerge("explain", "interrupted")
    assert ran.status == 0
    assert Interrupted.explanation in " ".join(ran.out.split())


@pytest.mark.parametrize("asked", ["Broken-Bitmap", "broken_bitmap", "broken bitmap"])
def test_a_code_may_be_spelled_loosely(asked: str) -> None:
    ran = chainmerge("explain", *asked.split())
    assert ran.out.startswith("broken-bitmap (")
    assert catalogue.explain(asked) == catalogue.FINDINGS["broken-bitmap"].text


@pytest.mark.parametrize(
    ("asked", "first"),
    [
        ("shared base", "base-has-other-children"),
        ("inconsistent", "broken-bitmap"),
        ("volume too small", "volume-group-full"),
        ("locked", "image-locked"),
        ("leaked", "leaked-clusters"),
    ],
)
def test_words_find_what_they_have_to_do_with(asked: str, first: str) -> None:
    found = [subject.code for subject in catalogue.look_up(asked.split())]
    assert 1 < len(found) < len(ERRORS) / 4
    assert first in found[:2]
    shown = chainmerge("explain", *asked.split())
    assert shown.status == 0
    assert [line.split()[0] for line in shown.out.splitlines() if line[2] != " "] == found


def test_all_words_have_to_fit() -> None:
    by_one = {subject.code for subject in catalogue.look_up(["bitmap"])}
    by_two = {subject.code for subject in catalogue.look_up(["bitmap", "name"])}
    assert by_two < by_one


def test_explain_lists_all_codes_by_exit_status() -> None:
    ran = chainmerge("explain")
    assert ran.status == 0
    groups = re.split(r"^(?=\S)", ran.out, flags=re.MULTILINE)[1:]
    listed = {
        group.partition(":")[0]: set(re.findall(r"^  ([a-z0-9-]+)", group, re.MULTILINE))
        for group in groups
    }
    for code, error in ERRORS.items():
        assert code in listed[f"Exit status {error.exit_code:d}"]
    assert set(catalogue.FINDINGS) in listed.values()


def test_explain_lists_all_codes_for_programs() -> None:
    listed = {one["code"]: one["exit_status"] for one in chainmerge("explain", "--json").json}
    assert listed == {code: error.exit_code for code, error in ERRORS.items()} | dict.fromkeys(
        catalogue.FINDINGS
    )


@pytest.mark.parametrize("arguments", [(), ("bitmap",), ("base-has-other-children",)])
def test_text_is_wrapped(arguments: tuple[str, ...]) -> None:
    for columns in (None, 60):
        more = {"COLUMNS": str(columns)} if columns else {}
        out = chainmerge("explain", *arguments, **more).out
        assert max(map(len, out.splitlines())) <= (columns or 80)


def test_a_code_with_a_slip_is_guessed() -> None:
    ran = chainmerge("explain", "interupted")
    assert ran.status == 2
    assert "did you mean interrupted" in ran.err


def test_placeholders_read_like_words() -> None:
    assert catalogue.with_placeholders("{a!r} of {b:,} {{c}}") == "<a> of <b> {c}"
