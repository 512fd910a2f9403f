# SPDX-License-Identifier: Apache-2.0
"""How large the image that is written must be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from chainmerge.documents.plan import EngineName
from chainmerge.options import Direction
from chainmerge.planning.choices import shares_extents
from chainmerge.planning.leaks import counted_as_used, find_leaks, leaked_before
from chainmerge.planning.space.figures import SpaceSurvey, without_figures
from chainmerge.planning.space.native import native_growth_obstacle, survey_native
from chainmerge.planning.space.qemu import survey_for_qemu
from chainmerge.planning.space.raw import survey_raw
from chainmerge.qcow2.check import check_with_references

if TYPE_CHECKING:
    from chainmerge.bitmaps.gathering import BitmapFacts
    from chainmerge.chain.opening import OpenChain
    from chainmerge.chain.target import Target
    from chainmerge.engines.metadata.snapshot_removal import SnapshotRemoval
    from chainmerge.engines.native.zeroes import ZeroRanges
    from chainmerge.options import MergeOptions


def survey_space(
    target: Target,
    opened: OpenChain,
    bitmaps: BitmapFacts,
    engine: EngineName,
    direction: Direction,
    zeroes: ZeroRanges | None,
    removal: SnapshotRemoval | None,
    options: MergeOptions,
) -> SpaceSurvey:
    """Work out how large the result must be for the merge. Reads tables only.

    *removal* is what is done to it before that, if anything.
    """
    base = opened.images[target.result_index(direction)]
    size_after = max(base.info.virtual_size, target.chain.top.virtual_size)
    if base.image is None:
        shares = engine is EngineName.NATIVE and shares_extents(
            opened, target.base_index, direction
        )
        return survey_raw(target, opened, size_after, shares=shares)
    report, references = check_with_references(base.image)
    if not report.sound:
        return without_figures(report, None)
    leaks = find_leaks(base.image, report, references, leaked_before(base.info.real_path))
    if options.reclaim:
        leaks = leaks.all_freed()
    references = counted_as_used(references, leaks.kept)
    if engine is EngineName.QEMU:
        survey = survey_for_qemu(target, opened, bitmaps, report, references)
        return replace(survey, leaks=leaks)
    obstacle = native_growth_obstacle(base.image, size_after)
    if obstacle is not None and direction is Direction.COMMIT:
        return without_figures(report, obstacle)
    native = survey_native(target, opened, bitmaps, references, direction, zeroes, removal)
    return SpaceSurvey(native.spaces, native.needs, report, None, leaks)
