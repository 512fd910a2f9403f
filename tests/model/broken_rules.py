# SPDX-License-Identifier: Apache-2.0
"""Rules for bitmaps other than they are, for tests that must notice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from chainmerge.bitmaps.rules import Decision, LayerBitmaps, decide

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from tests.model.memory import Decide


def changed(change: Callable[[Decision], Decision]) -> Decide:
    def decide_otherwise(
        chain: Sequence[LayerBitmaps],
        base_index: int,
        names_above: Collection[str],
        *,
        top_stays: bool,
    ) -> tuple[Decision, ...]:
        decisions = decide(chain, base_index, names_above, top_stays=top_stays)
        return tuple(change(decision) for decision in decisions)

    return decide_otherwise


def without_tombstones(decision: Decision) -> Decision:
    return replace(decision, tombstone=False, tombstone_while_top_exists=False)
