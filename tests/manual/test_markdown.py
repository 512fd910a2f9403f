# SPDX-License-Identifier: Apache-2.0
"""What is written into the site's own pages is read as it was meant."""

from __future__ import annotations

import pytest

from manual import markdown


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("use `a_b *` now", "use `a_b *` now"),
        ("<image>: a*b_c", r"\<image\>: a\*b\_c"),
        ("with --leave, or -n", "with `--leave`, or `-n`"),
        ("read-only, `--all` of them", "read-only, `--all` of them"),
        ("[default: auto]", r"\[default: auto\]"),
    ],
)
def test_prose(text: str, written: str) -> None:
    assert markdown.prose(text) == written


def test_a_table() -> None:
    assert markdown.table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
