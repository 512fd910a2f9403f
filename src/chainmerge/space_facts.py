# SPDX-License-Identifier: Apache-2.0
"""Counts what base needs."""
from __future__ import annotations
from dataclasses import dataclass
from chainmerge.inspection import BitmapFacts, OpenChain, Target
from chainmerge.planning import SpaceFacts

@dataclass(frozen=True, slots=True)
class SpaceGathered:
    facts: SpaceFacts
    new_clusters: int
    new_l2_tables: int

def gather_space(target: Target, opened: OpenChain, bitmaps: BitmapFacts) -> SpaceGathered:
    return SpaceGathered(SpaceFacts(0,0,0,{}),0,0)
