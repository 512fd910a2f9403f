# SPDX-License-Identifier: Apache-2.0
"""The colours of a page have the contrast that WCAG 2.2 asks for on level AA."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import pytest

from chainmerge.report.html.palette import DARK, DRAWN, GROUNDS, LIGHT, TEXTS
from tests.support.contrast import contrast

if TYPE_CHECKING:
    from collections.abc import Mapping

TEXT = 4.5
"""Success criterion 1.4.3, text that is not large."""
GRAPHICS = 3.0
"""Success criterion 1.4.11."""


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_text_can_be_read_and_drawings_can_be_seen(colours: Mapping[str, str]) -> None:
    for names, least in ((TEXTS, TEXT), (DRAWN, GRAPHICS)):
        for name, ground in product(names, GROUNDS):
            assert contrast(colours[name], colours[ground]) >= least, (name, ground)


def test_both_have_the_same_colours() -> None:
    assert LIGHT.keys() == DARK.keys()
    assert {*TEXTS, *DRAWN, *GROUNDS} <= LIGHT.keys()


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [("#000000", "#ffffff", 21.0), ("#777777", "#ffffff", 4.48), ("#123456", "#123456", 1.0)],
)
def test_contrast_is_that_of_wcag(one: str, other: str, expected: float) -> None:
    assert contrast(one, other) == pytest.approx(expected, abs=0.01)
    assert contrast(other, one) == contrast(one, other)
