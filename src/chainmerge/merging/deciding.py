# SPDX-License-Identifier: Apache-2.0
"""Decides on a merge of images that are locked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from chainmerge.chain.errors import ImageDamaged, ImageReplaced
from chainmerge.chain.target import Target, find_target
from chainmerge.merging.job import Job, Request
from chainmerge.options import Direction
from chainmerge.planning.already_merged import (
    holds_bitmaps,
    holds_content,
    merged_before,
    was_merged_before,
)
from chainmerge.planning.evidence import explained_by, weigh
from chainmerge.planning.gathering import Gathered, gather
from chainmerge.planning.locking import not_writable
from chainmerge.planning.placement import bytes_to_copy
from chainmerge.planning.plan import make_plan
from chainmerge.planning.refusals import find_refusals

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.chain.opening import OpenChain
    from chainmerge.chain.surroundings import Look
    from chainmerge.errors import ChainmergeError
    from chainmerge.merging.resuming import ToBeMerged
    from chainmerge.planning.facts import MergeFacts
    from chainmerge.records.remains import Remains
    from chainmerge.storage.locks import ImageLock


def decided_job(
    request: Request,
    target: Target,
    opened: OpenChain,
    locks: tuple[ImageLock, ...],
    remains: Remains,
    ending: ToBeMerged,
) -> Job:
    """Look at the locked images, and decide on everything.

    Raises:
        Refused: it will not be done.
    """
    found = _gather_to_merge(target, opened, request, remains, ending)
    if not (explained_by(remains, target) or found.facts.content_merged):
        found = _weighed(found, target, opened, request)
    for refusal in find_refusals(found.facts, request.options):
        raise refusal
    decided = make_plan(found.facts, request.options)
    return Job(
        request,
        target,
        found.facts,
        found.bitmaps,
        found.needs,
        found.zeroes,
        found.leaks,
        decided,
        opened,
        locks,
        remains,
    )


def find_target_of(request: Request, look: Look | None = None) -> Target:
    """The images that a merge is about; *look* is the one that this is a part of."""
    return find_target(request.top, request.base, request.access, look)


def find_same_target(before: Target, request: Request, look: Look | None = None) -> Target:
    """Look again, now that nobody else can change the chain any more."""
    target = find_target_of(request, look)
    for old, new in zip(before.chain.images, target.chain.images, strict=False):
        if old.identity != new.identity:
            raise ImageReplaced(str(new.path))
    if len(before.chain.images) != len(target.chain.images):
        raise ImageReplaced(str(target.chain.top.path))
    known = {child.identity for child in before.relatives.children}
    for child in target.relatives.children:
        if child.identity not in known:
            raise ImageReplaced(str(child.path))
    return target


def _gather_to_merge(
    target: Target,
    opened: OpenChain,
    request: Request,
    remains: Remains,
    ending: ToBeMerged,
) -> Gathered:
    options, should_stop = request.options, request.should_stop
    saved = remains.usable_saved
    found = gather(target, opened, request.access, options, saved, should_stop, request.claims)
    facts = found.facts
    commits = facts.direction is Direction.COMMIT
    bitmaps_are_there = commits and holds_bitmaps(target, opened, found.bitmaps)
    # Who stands on base can be one that is re-pointed already, bitmaps or not.
    before = was_merged_before(target, facts, remains.record, options)
    worth_comparing = bitmaps_are_there or before or bool(commits and target.relatives.siblings)
    equal = worth_comparing and holds_content(target, opened, facts, options, should_stop)
    merged = equal and bitmaps_are_there
    damage = () if merged else tuple(_damaged_sources(opened, facts))
    newer = (merged_before(target),) if before and not equal else ()
    obstacles = (*not_writable(target, options), *newer, *facts.obstacles, *damage)
    facts = replace(
        facts,
        obstacles=obstacles,
        merged=merged,
        content_merged=equal and commits,
        warnings=(*ending.warnings, *facts.warnings),
        end_before=ending.end_before,
    )
    return replace(found, facts=facts)


def _weighed(found: Gathered, target: Target, opened: OpenChain, request: Request) -> Gathered:
    moved = bytes_to_copy(found.facts)
    evidence = weigh(target, opened, moved, request.should_stop, None)
    return replace(found, facts=replace(found.facts, evidence=evidence))


def _damaged_sources(opened: OpenChain, facts: MergeFacts) -> Iterator[ChainmergeError]:
    """The images that are merged into another one and whose tables contradict themselves.

    Data and bits that something else was written over would go there as if they were right.
    A plan does not look for this: it takes as long as reading all tables twice.
    """
    merged = {image.identity for image in facts.merged_images}
    for overlay in opened.images:
        if overlay.image is None or overlay.info.identity not in merged:
            continue
        report = opened.check(overlay)
        # Stale refcounts are what the dirty bit stands for.
        stale = overlay.image.header.dirty and report.complete
        if report.overlaps or (report.corruptions and not stale):
            first = next(iter(report.messages), "see chainmerge check")
            path = str(overlay.info.path)
            yield ImageDamaged(path, report.corruptions + report.overlaps, first)
