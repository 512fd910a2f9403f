# SPDX-License-Identifier: Apache-2.0
"""Looks at the disk and gathers the facts that a plan rests on. Reads only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from chainmerge.bitmaps.gathering import BitmapFacts, gather_bitmaps, gather_bitmaps_to_pull
from chainmerge.chain.readability import require_readable
from chainmerge.documents.plan import EngineName
from chainmerge.engines.native.survey import MappingNeed
from chainmerge.engines.native.zeroes import ZeroRanges
from chainmerge.options import Access, Direction, MergeOptions, Placement
from chainmerge.planning.choices import choose_direction, choose_engine, look_for_zeroes
from chainmerge.planning.encryption import key_obstacles
from chainmerge.planning.facts import MergeFacts
from chainmerge.planning.hiding import hiding_needed
from chainmerge.planning.internal_snapshots import children_with_larger_snapshots, look_at_snapshots
from chainmerge.planning.leaks import Leaks
from chainmerge.planning.locking import too_many_files
from chainmerge.planning.movement import measure_guest_bytes, movement_of
from chainmerge.planning.removals import look_at_removals
from chainmerge.planning.space.header import header_obstacle
from chainmerge.planning.space.survey import survey_space
from chainmerge.records.changes import is_there
from chainmerge.records.errors import BitmapsSetAside
from chainmerge.records.identity import identify, may_be_same
from chainmerge.records.saved_bitmaps import load_saved_bitmaps, saved_bitmaps_file
from chainmerge.storage.volumes import volume_at

if TYPE_CHECKING:
    from chainmerge.chain.opening import OpenChain
    from chainmerge.chain.target import Target
    from chainmerge.documents.progress import ShouldStop
    from chainmerge.errors import ChainmergeError
    from chainmerge.records.saved_bitmaps import SavedBitmaps


@dataclass(frozen=True, slots=True)
class Gathered:
    """What was found on disk."""

    facts: MergeFacts
    bitmaps: BitmapFacts
    needs: Mapping[Placement, MappingNeed]
    zeroes: ZeroRanges | None
    leaks: Leaks


def never() -> bool:
    return False


def gather(
    target: Target,
    opened: OpenChain,
    access: Access,
    options: MergeOptions,
    saved: SavedBitmaps | None,
    should_stop: ShouldStop,
    claims: Mapping[str, int],
) -> Gathered:
    require_readable(target, opened)
    top_stays = not (options.delete or options.keep_name)
    volumes = measure_guest_bytes(target, opened)
    way = choose_direction(target, opened, volumes, options)
    if way.direction is Direction.PULL:
        bitmaps = gather_bitmaps_to_pull(target, opened)
    else:
        bitmaps = gather_bitmaps(target, opened, saved, top_stays=top_stays)
    chosen = choose_engine(target, opened, options.engine, way.direction)
    zeroes = None
    if options.detect_zeroes and chosen.engine is EngineName.NATIVE:
        zeroes = look_for_zeroes(target, opened, way.direction, should_stop)
    snapshots = look_at_snapshots(target, opened, way.direction, to_remove=options.drop_snapshots)
    result = opened.images[target.result_index(way.direction)]
    survey = survey_space(
        target,
        opened,
        bitmaps,
        chosen.engine,
        way.direction,
        zeroes,
        snapshots.removals.get(str(result.info.path)),
        options,
    )
    obstacles = (
        way.obstacle,
        chosen.obstacle,
        survey.obstacle,
        *snapshots.obstacles,
        *_bitmaps_set_aside(target, way.direction),
        *(children_with_larger_snapshots(target) if way.direction is Direction.COMMIT else ()),
        too_many_files(target, chosen.engine),
        *key_obstacles(target.chain, options),
    )
    facts = MergeFacts(
        chain=target.chain,
        base_index=target.base_index,
        relatives=target.relatives,
        decisions=bitmaps.decisions,
        final_bits=bitmaps.final_bits,
        recovered=bitmaps.recovered,
        interrupted=saved is not None,
        result_check=survey.check,
        movement=movement_of(volumes),
        pull_bytes=volumes.pull,
        # An earlier run has made zero clusters of stored zeros, or none where none was needed.
        undefined_bytes=volumes.undefined
        - (volumes.undefined_zeros if options.detect_zeroes else 0),
        merged=None,
        volume=volume_at(result.info.real_path, options).facts().beside(claims),
        engine=chosen.engine,
        engine_reason=chosen.reason,
        direction=way.direction,
        pull_obstacle=way.pull_obstacle,
        spaces=survey.spaces,
        obstacles=tuple(one for one in obstacles if one is not None),
        warnings=bitmaps.warnings,
        removals=look_at_removals(target.chain, target.base_index, access, options),
        snapshots=snapshots.views,
        leaks=survey.leaks.facts,
    )
    facts = replace(facts, hiding=hiding_needed(target, opened, way.direction, facts.volume))
    no_room = header_obstacle(result, facts, bitmaps)
    if no_room is not None:
        facts = replace(facts, obstacles=(*facts.obstacles, no_room))
    return Gathered(facts, bitmaps, survey.needs, zeroes, survey.leaks)


def _bitmaps_set_aside(target: Target, direction: Direction) -> Iterator[ChainmergeError]:
    """Images other than the base of a commit whose checkpoints an interrupted merge has taken out.

    Those of base are put back, united with the others.
    """
    first = target.base_index + (1 if direction is Direction.COMMIT else 0)
    for image in target.chain.images[first:]:
        file = saved_bitmaps_file(image.real_path)
        if image.header is None or not file.exists():
            continue
        saved = load_saved_bitmaps(image.real_path)
        if saved is None or not may_be_same(saved.base, identify(image.real_path)):
            continue
        # Without the overlay nobody can finish that merge, nor put anything back.
        if not is_there(saved.overlay):
            continue
        names = [bitmap.name for bitmap in saved.bitmaps if bitmap.in_base is not None]
        if names:
            yield BitmapsSetAside(str(image.path), ", ".join(map(repr, names)), str(file))
