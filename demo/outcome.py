# SPDX-License-Identifier: Apache-2.0
"""What a merge left behind, as QEMU's own tools see it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

from demo.scenario import GOOD, Case, Workshop
from tests.support.qemu import bitmap_names, check, dirty_ranges, run


@dataclass(frozen=True)
class Outcome:
    """Base after an attempt.

    Attributes:
        content_right: Whether a guest would read what it read from top before.
        good: State of the good bitmap: valid, disabled, in-use, absent, or wrong bits.
        others: How many of the other bitmaps are in which state.
        clean: Whether `qemu-img check` has nothing to say.
    """

    content_right: bool
    good: str
    others: dict[str, int]
    clean: bool

    @property
    def right(self) -> bool:
        """Whether it is all as it has to be."""
        return self.content_right and self.good == "valid" and self.clean


def look_at(case: Case, workshop: Workshop) -> Outcome:
    """Examine base."""
    base = case.volume.path
    states = {name: _state(bitmap) for name, bitmap in bitmap_names(base).items()}
    good = states.get(GOOD, "absent")
    if good == "valid" and dirty_ranges(base, GOOD) != workshop.dirty_ranges(GOOD):
        good = "wrong bits"
    found = check(base)
    return Outcome(
        content_right=same_content(case),
        good=good,
        others=dict(Counter(state for name, state in states.items() if name != GOOD)),
        clean=found["corruptions"] == 0 and found["leaks"] == 0,
    )


def same_content(case: Case) -> bool:
    """Whether base reads as top did."""
    formats = ("-f", "qcow2", "-F", "qcow2")
    result = run(
        "qemu-img", "compare", "-q", *formats, case.expected, case.volume.path, expect=(0, 1)
    )
    return result.returncode == 0


def _state(bitmap: dict[str, object]) -> str:
    flags = json.dumps(bitmap["flags"])
    if "in-use" in flags:
        return "in-use"
    return "valid" if "auto" in flags else "disabled"
