# SPDX-License-Identifier: Apache-2.0
"""What is written into manual pages is read as it was meant."""

from __future__ import annotations

import pytest

from manual import roff


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("a\\b", r"a\eb"),
        ("top's", r"top\(aqs"),
        ("~/x", r"\(ti/x"),
        ("a → b", r"a \[u2192] b"),
        ("use `plan --json` now", r"use \fBplan \-\-json\fR now"),
        ("and --leave.", r"and \fB\-\-leave\fR."),
        ("read-only", "read-only"),
        ("put TOP into BASE", r"put \fITOP\fR into BASE"),
        ("TOPs, not STOP", r"\fITOP\fRs, not STOP"),
    ],
)
def test_prose(text: str, written: str) -> None:
    assert roff.prose(text, {"TOP"}) == written


def test_no_line_of_text_is_a_request() -> None:
    text = f"{'x' * 76} .SH NAME"
    assert roff.prose(text).splitlines() == ["x" * 76, r"\&.SH NAME"]
    assert roff.prose("'quoted'") == r"\(aqquoted\(aq"


def test_lines_are_not_longer_than_80_bytes() -> None:
    assert max(map(len, roff.prose("word --option " * 40).splitlines())) <= 80
