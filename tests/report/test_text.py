# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainmerge.documents.text import printable
from chainmerge.report.text import exact_size, human_size, rough_size, short_time

any_text = st.text(st.characters(exclude_categories=()))


@given(any_text)
def test_printable_text_is_visible_and_can_be_encoded(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    shown.encode("utf-8")


@given(st.text(st.characters(categories=("L", "M", "N", "P", "S"))))
def test_visible_text_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("two\nlines\ttabbed", r"two\nlines\ttabbed"),
        (os.fsdecode(b"caf\xe9"), r"caf\xe9"),
        ("\ud800", r"\ud800"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\x9b31m", r"\x9b31m"),
        ("café [red]", "café [red]"),
    ],
)
def test_what_would_deceive_is_shown_as_an_escape(name: str, shown: str) -> None:
    assert printable(name) == shown


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (128 << 20, "128 MiB"),
        ((128 << 20) - 1, "~128 MiB"),
        (2**63 - 1, "~8 EiB"),
        (1 << 62, "4 EiB"),
    ],
)
def test_sizes_say_whether_they_are_rounded(size: int, shown: str) -> None:
    assert human_size(size) == shown


@given(st.integers(0, 2**63 - 1))
def test_exact_sizes_hold_the_exact_number(size: int) -> None:
    assert str(size) in exact_size(size)


def test_rough_sizes_keep_their_width() -> None:
    sizes = [rough_size(size) for size in (0, 0.4, 1023, 2.2 * 2**20, 2**63)]
    assert sizes == ["0.0 B", "0.4 B", "1023.0 B", "2.2 MiB", "8.0 EiB"]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7199, "120 min"),
        (7200, "2 h"),
        (47.4 * 3600, "47 h"),
        (48 * 3600, "2 days"),
    ],
)
def test_durations_have_the_unit_that_people_count_in(seconds: float, shown: str) -> None:
    assert short_time(seconds) == shown
