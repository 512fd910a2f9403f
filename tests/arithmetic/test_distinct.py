# SPDX-License-Identifier: Apache-2.0
"""The values of an array, each once: what numpy's own function finds, without what it imports."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import chainmerge
from chainmerge.arithmetic.distinct import distinct, distinct_with_counts

few_values = arrays.arrays(
    st.sampled_from([np.uint8, np.int32, np.int64, np.uint64]),
    st.integers(0, 30),
    elements=st.integers(0, 12),
)
any_values = arrays.arrays(
    np.uint64, st.integers(0, 30), elements=st.integers(0, 2**64 - 1) | st.integers(0, 3)
)


@given(values=few_values | any_values)
def test_values_are_those_that_numpy_finds(values: np.ndarray) -> None:
    before = values.copy()
    found = distinct(values)
    assert found.dtype == values.dtype
    assert found.tolist() == np.unique(values).tolist()
    assert values.tolist() == before.tolist()


@given(values=few_values | any_values)
def test_counts_are_those_that_numpy_finds(values: np.ndarray) -> None:
    found, counts = distinct_with_counts(values)
    expected, times = np.unique(values, return_counts=True)
    assert found.dtype == values.dtype
    assert found.tolist() == expected.tolist()
    assert counts.tolist() == times.tolist()


def test_masked_arrays_are_not_imported() -> None:
    program = (
        "import sys, numpy as np\n"
        "from chainmerge.arithmetic.distinct import distinct, distinct_with_counts\n"
        "distinct(np.array([2, 1, 2])), distinct_with_counts(np.array([2, 1, 2]))\n"
        "sys.exit('numpy.ma' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", ["unique", "union1d", "unique_values", "intersect1d"])
def test_nobody_calls_what_imports_them(name: str) -> None:
    calls = re.compile(rf"\bnp\.{name}\(")
    sources = Path(chainmerge.__file__).parent.rglob("*.py")
    assert [str(file) for file in sources if calls.search(file.read_text())] == []
