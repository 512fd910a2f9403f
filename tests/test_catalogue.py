# SPDX-License-Identifier: Apache-2.0
"""Every error of the package: that its words are in order."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, Final

import pytest

from chainmerge import catalogue, errors
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


def test_explain_prints_the_long_form() -> None:
    ran = chainmerge("explain", "interrupted")
    assert ran.status == 0
    assert Interrupted.explanation in ran.out


def test_explain_lists_all_codes() -> None:
    ran = chainmerge("explain")
    assert ran.status == 0
    listed = {line.split()[0] for line in ran.out.splitlines()[1:]}
    assert set(ERRORS) <= listed


def test_a_code_with_a_slip_is_guessed() -> None:
    ran = chainmerge("explain", "interupted")
    assert ran.status == 2
    assert "did you mean interrupted?" in ran.err


def test_placeholders_read_like_words() -> None:
    assert catalogue.with_placeholders("{a!r} of {b:,} {{c}}") == "<a> of <b> {c}"
