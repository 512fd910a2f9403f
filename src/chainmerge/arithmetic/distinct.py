# SPDX-License-Identifier: Apache-2.0
"""The values of an array, each once.

Instead of np.unique and np.union1d: these import numpy.ma when they are called for the first time,
which takes as long as a small plan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from chainmerge.arithmetic.arrays import BoolArray, IndexArray

Number = TypeVar("Number", bound=np.integer)


def distinct(values: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """All values, ascending, each once.

    Much faster than np.unique where *values* consists of a few ascending pieces, which a
    stable sort merges.
    """
    ordered = np.sort(values, kind="stable")
    return ordered[_are_first(ordered)]


def distinct_with_counts(values: npt.NDArray[Number]) -> tuple[npt.NDArray[Number], IndexArray]:
    """All values, ascending, each once, and how many times each is there."""
    ordered = np.sort(values, kind="stable")
    first = np.flatnonzero(_are_first(ordered))
    return ordered[first], np.diff(first, append=len(ordered))


def _are_first(ordered: npt.NDArray[Number]) -> BoolArray:
    """Which elements differ from the one before them."""
    first = np.ones(len(ordered), np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    return first
