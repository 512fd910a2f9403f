# SPDX-License-Identifier: Apache-2.0
"""Whole units that hold a number."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from chainmerge.arithmetic.arrays import I64Array

Whole = TypeVar("Whole", int, "I64Array")
"""A whole number, or an array of whole numbers."""


def divide_up(value: Whole, unit: int) -> Whole:
    """How many units hold *value*."""
    return -(-value // unit)


def round_up(value: Whole, unit: int) -> Whole:
    """The lowest multiple of *unit* that is not below *value*."""
    return divide_up(value, unit) * unit
