# SPDX-License-Identifier: Apache-2.0
"""The figures of a survey of space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from msgspec import Struct

from chainmerge.engines.native.survey import MappingNeed
from chainmerge.errors import ChainmergeError
from chainmerge.options import Placement
from chainmerge.planning.facts import SpaceFacts
from chainmerge.planning.leaks import NO_LEAKS, Leaks
from chainmerge.qcow2.check import CheckReport

if TYPE_CHECKING:
    from chainmerge.planning.space.need import SpaceNeed


class SpaceSurvey(Struct, frozen=True):
    """What was found out about base's space.

    ``spaces`` has the ways in which the engine can place data, ``needs`` what the native
    engine is to be given for them. ``check`` is the consistency check of base, None for a raw
    one. The figures are only good if it is sound. ``leaks`` are the leaked clusters of what is
    written; those that stay count as used.
    """

    spaces: Mapping[Placement, SpaceFacts]
    needs: Mapping[Placement, MappingNeed]
    check: CheckReport | None
    obstacle: ChainmergeError | None
    leaks: Leaks = NO_LEAKS


def facts_of_need(need: SpaceNeed) -> SpaceFacts:
    return SpaceFacts(need.image_end, need.required, need.optimal, need.breakdown, 0, 0, 0)


def without_figures(report: CheckReport, obstacle: ChainmergeError | None) -> SpaceSurvey:
    """There are no figures for an image that is damaged or cannot grow, but that it is refused."""
    end = report.image_end_offset
    nothing = SpaceFacts(end, end, end, {}, 0, 0, 0)
    return SpaceSurvey(dict.fromkeys(Placement, nothing), {}, report, obstacle)
