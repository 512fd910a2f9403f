# SPDX-License-Identifier: Apache-2.0
"""Looks at the disk and gathers the facts that a plan rests on. Reads only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from chainmerge.bitmaps.gathering import BitmapFacts, gather_bitmaps, gather_bitmaps_to_pull
from chainmerge.chain.readability import require_readable
from chainmerge.documents.plan import EngineName
from chainmerge.engines.native.survey import MappingNeed
from chainmerge.engines.native.zeroes import ZeroRanges
from chainmerge.options import Access, Direction, MergeOptions, Placement
from chainmerge.planning.choices import (
    DirectionChosen,
    EngineChosen,
    choose_direction,
    choose_engine,
    look_for_zeroes,
    require_format_to_write,
    shares_extents,
)
from chainmerge.planning.encryption import key_obstacles
from chainmerge.planning.facts import MergeFacts
from chainmerge.planning.freeing import bytes_occupied, footprints_of
from chainmerge.planning.hiding import hiding_needed
from chainmerge.planning.internal_snapshots import (
    SnapshotFacts,
    children_with_larger_snapshots,
    look_at_snapshots,
)
from chainmerge.planning.leaks import Leaks
from chainmerge.planning.locking import too_many_files
from chainmerge.planning.movement import GuestBytes, measure_guest_bytes, movement_of
from chainmerge.planning.removals import look_at_removals
from chainmerge.planning.space.figures import SpaceSurvey
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


class Gathered(Struct, frozen=True):
    """What was found on disk."""

    facts: MergeFacts
    bitmaps: BitmapFacts
    needs: Mapping[Placement, MappingNeed]
    zeroes: ZeroRanges | None
    leaks: Leaks


class _Ways(Struct, frozen=True):
    """What was chosen for a merge, and what was found out for it."""

    direction: DirectionChosen
    engine: EngineChosen
    guest_bytes: GuestBytes
    bitmaps: BitmapFacts
    zeroes: ZeroRanges | None
    snapshots: SnapshotFacts
    space: SpaceSurvey


def gather(
    target: Target,
    opened: OpenChain,
    access: Access,
    options: MergeOptions,
    saved: SavedBitmaps | None,
    should_stop: ShouldStop,
    claims: Mapping[str, int],
) -> Gathered:
    """Find out everything that a plan of a merge rests on.

    Args:
        target: the images that it is about.
        opened: the same, open.
        access: as for a merge, and so are *options* and *should_stop*.
        options: see there.
        saved: what an interrupted merge has saved of base's bitmaps.
        should_stop: see there.
        claims: bytes that merges beside this one take, by the pool that they come from.

    Raises:
        Refused: an image cannot be read, or base is of a format that is not written.
        Interrupted: *should_stop* said yes.
    """
    require_readable(target, opened)
    ways = _choose_ways(target, opened, options, saved, should_stop)
    result = opened.images[target.result_index(ways.direction.direction)]
    facts = MergeFacts(
        chain=target.chain,
        base_index=target.base_index,
        relatives=target.relatives,
        decisions=ways.bitmaps.decisions,
        final_bits=ways.bitmaps.final_bits,
        recovered=ways.bitmaps.recovered,
        interrupted=saved is not None,
        result_check=ways.space.check,
        movement=movement_of(ways.guest_bytes),
        pull_bytes=ways.guest_bytes.pull,
        undefined_bytes=_undefined_bytes(ways.guest_bytes, options),
        merged=None,
        volume=volume_at(result.info.real_path, options).facts().beside(claims),
        engine=ways.engine.engine,
        engine_reason=ways.engine.reason,
        direction=ways.direction.direction,
        pull_obstacle=ways.direction.pull_obstacle,
        spaces=ways.space.spaces,
        obstacles=tuple(_obstacles(target, options, ways)),
        warnings=ways.bitmaps.warnings,
        removals=look_at_removals(target.chain, target.base_index, access, options),
        snapshots=ways.snapshots.views,
        leaks=ways.space.leaks.facts,
        shares=_shares(target, opened, ways),
        occupied=bytes_occupied(target.chain),
        footprints=footprints_of(target.chain.images[target.base_index :]),
    )
    facts = replace(facts, hiding=hiding_needed(target, opened, facts.direction, facts.volume))
    no_room = header_obstacle(result, facts, ways.bitmaps)
    if no_room is not None:
        facts = replace(facts, obstacles=(*facts.obstacles, no_room))
    return Gathered(facts, ways.bitmaps, ways.space.needs, ways.zeroes, ways.space.leaks)


def _choose_ways(
    target: Target,
    opened: OpenChain,
    options: MergeOptions,
    saved: SavedBitmaps | None,
    should_stop: ShouldStop,
) -> _Ways:
    guest_bytes = measure_guest_bytes(target, opened)
    way = choose_direction(target, opened, guest_bytes, options)
    require_format_to_write(target, way.direction)
    if way.direction is Direction.PULL:
        top = target.chain.top.real_path
        bitmaps = gather_bitmaps_to_pull(target, opened, load_saved_bitmaps(top))
    else:
        top_stays = not (options.delete or options.keep_name)
        bitmaps = gather_bitmaps(target, opened, saved, top_stays=top_stays)
    chosen = choose_engine(target, opened, options.engine, way.direction)
    zeroes = None
    if options.detect_zeroes and chosen.engine is EngineName.NATIVE:
        zeroes = look_for_zeroes(target, opened, way.direction, should_stop)
    snapshots = look_at_snapshots(target, opened, way.direction, to_remove=options.drop_snapshots)
    result = opened.images[target.result_index(way.direction)]
    space = survey_space(
        target,
        opened,
        bitmaps,
        chosen.engine,
        way.direction,
        zeroes,
        snapshots.removals.get(str(result.info.path)),
        options,
    )
    return _Ways(way, chosen, guest_bytes, bitmaps, zeroes, snapshots, space)


def _shares(target: Target, opened: OpenChain, ways: _Ways) -> bool:
    """Whether data is shared in place of copied: only the native engine does."""
    is_native = ways.engine.engine is EngineName.NATIVE
    return is_native and shares_extents(opened, target.base_index, ways.direction.direction)


def _undefined_bytes(guest_bytes: GuestBytes, options: MergeOptions) -> int:
    """An earlier run has made zero clusters of stored zeros, or none where none was needed."""
    zeros = guest_bytes.undefined_zeros if options.detect_zeroes else 0
    return guest_bytes.undefined - zeros


def _obstacles(target: Target, options: MergeOptions, ways: _Ways) -> Iterator[ChainmergeError]:
    direction = ways.direction.direction
    for one in (ways.direction.obstacle, ways.engine.obstacle, ways.space.obstacle):
        if one is not None:
            yield one
    yield from ways.snapshots.obstacles
    yield from _bitmaps_set_aside(target, direction)
    if direction is Direction.COMMIT:
        yield from children_with_larger_snapshots(target)
    limited = too_many_files(target, ways.engine.engine)
    if limited is not None:
        yield limited
    yield from key_obstacles(target.chain, options)


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
        if direction is Direction.PULL and image == target.chain.top and saved.is_of_pull:
            continue
        # Without the overlay nobody can finish that merge, nor put anything back.
        if not is_there(saved.overlay):
            continue
        names = [bitmap.name for bitmap in saved.bitmaps if bitmap.in_base is not None]
        if names:
            yield BitmapsSetAside(str(image.path), ", ".join(map(repr, names)), str(file))
