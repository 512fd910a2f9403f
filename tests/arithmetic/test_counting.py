# SPDX-License-Identifier: Apache-2.0
"""Numbers as they stand in sentences."""

from __future__ import annotations

import pytest

from chainmerge.arithmetic.counting import counted


@pytest.mark.parametrize(
    ("number", "noun", "said"),
    [
        (0, "bitmap", "0 bitmaps"),
        (1, "bitmap", "1 bitmap"),
        (2, "bitmap", "2 bitmaps"),
        (1, "L2 entry", "1 L2 entry"),
        (2, "L2 entry", "2 L2 entries"),
        (2, "directory", "2 directories"),
        (2, "key", "2 keys"),
    ],
)
def test_numbers_agree_with_their_nouns(number: int, noun: str, said: str) -> None:
    assert counted(number, noun) == said
