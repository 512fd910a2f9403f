# SPDX-License-Identifier: Apache-2.0
"""Whole units that hold a number: for single numbers, and for arrays of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainmerge.arithmetic.rounding import divide_up, round_up

# Beyond what a float could tell apart.
values = st.integers(0, 2**63 - 1)
units = st.integers(1, 2**31)


@pytest.mark.parametrize(
    ("value", "unit", "count"),
    [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (2**63 - 1, 2, 2**62)],
)
def test_examples(value: int, unit: int, count: int) -> None:
    assert divide_up(value, unit) == count
    assert round_up(value, unit) == count * unit


@given(value=values, unit=units)
def test_the_units_hold_it_and_one_less_does_not(value: int, unit: int) -> None:
    count = divide_up(value, unit)
    assert count * unit >= value
    assert not count or (count - 1) * unit < value
    assert round_up(value, unit) == count * unit


@given(several=st.lists(st.integers(0, 2**53), max_size=8), unit=units)
def test_an_array_is_rounded_number_by_number(several: list[int], unit: int) -> None:
    array = np.array(several, dtype=np.int64)
    assert divide_up(array, unit).tolist() == [divide_up(value, unit) for value in several]
    assert round_up(array, unit).tolist() == [round_up(value, unit) for value in several]
    assert array.tolist() == several
