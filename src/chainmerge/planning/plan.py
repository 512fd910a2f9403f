# SPDX-License-Identifier: Apache-2.0
"""What a merge will do: decided from facts, before anything is written.

:func:`make_plan` is pure. Everything that it needs to know about the disk comes in as
:class:`~chainmerge.planning.facts.MergeFacts` (:mod:`chainmerge.planning.gathering` collects
them); everything that the other stages do follows from the
:class:`~chainmerge.documents.plan.MergePlan` that it returns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from chainmerge.documents.plan import (
    DirectionCost,
    Directions,
    Finding,
    MergePlan,
    Movement,
    PlannedBitmap,
    PlannedHiding,
    PlannedImage,
    Progress,
    Role,
)
from chainmerge.documents.versions import PLAN_VERSION
from chainmerge.planning.aftermath import (
    planned_deletions,
    planned_rename,
    planned_repoints,
    planned_snapshots,
)
from chainmerge.planning.freeing import deletable_bytes, freed_bytes, shared_bytes
from chainmerge.planning.placement import bytes_to_copy, chosen_space, planned_space
from chainmerge.planning.refusals import find_refusals
from chainmerge.planning.warnings import find_warnings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.bitmaps.rules import Decision
    from chainmerge.chain.model import ImageInfo
    from chainmerge.options import MergeOptions
    from chainmerge.planning.facts import MergeFacts


def make_plan(facts: MergeFacts, options: MergeOptions) -> MergePlan:
    """Decide on everything that a merge will do."""
    base, top = facts.base, facts.top
    return MergePlan(
        version=PLAN_VERSION,
        base=str(base.path),
        top=str(top.path),
        progress=_progress(facts),
        images=tuple(_planned_images(facts)),
        engine=facts.engine,
        engine_reason=facts.engine_reason,
        movement=_movement(facts, options),
        directions=_directions(facts),
        virtual_size_before=facts.result.virtual_size,
        virtual_size_after=facts.size_after,
        bitmaps=tuple(_planned_bitmap(decision, facts) for decision in facts.decisions),
        snapshots=tuple(planned_snapshots(views, facts, options) for views in facts.snapshots),
        space=planned_space(facts, options),
        hides=_hides(facts),
        repoint=planned_repoints(facts, options),
        delete=planned_deletions(facts, options),
        rename=planned_rename(facts, options),
        verify=options.verify,
        other_users=_other_users(facts),
        searched=facts.relatives.searched,
        refusals=tuple(map(Finding.of, find_refusals(facts, options))),
        warnings=(*facts.warnings, *find_warnings(facts, options)),
        leaks=facts.leaks,
        shared_bytes=shared_bytes(facts),
        freed_bytes=freed_bytes(facts, options),
        deletable_bytes=deletable_bytes(facts, options),
    )


def _movement(facts: MergeFacts, options: MergeOptions) -> Movement:
    space = chosen_space(facts, options)
    return replace(
        facts.movement, new_clusters=space.new_clusters, new_l2_tables=space.new_l2_tables
    )


def _progress(facts: MergeFacts) -> Progress:
    if facts.merged:
        return Progress.MERGED
    return Progress.INTERRUPTED if facts.interrupted else Progress.NEW


def _planned_images(facts: MergeFacts) -> Iterator[PlannedImage]:
    roles = [
        *(Role.BELOW for _ in range(facts.base_index)),
        Role.BASE,
        *(Role.MIDDLE for _ in facts.merged_images[:-1]),
        Role.TOP,
    ]
    parent: str | None = None
    for image, role in zip(facts.chain.images, roles, strict=True):
        yield _planned_image(image, role, parent)
        parent = str(image.path)
    for above in facts.relatives.above:
        parent = str(above.between[0] if above.between else facts.top.path)
        yield _planned_image(above.image, Role.ABOVE, parent)


def _planned_image(image: ImageInfo, role: Role, parent: str | None) -> PlannedImage:
    return PlannedImage(
        path=str(image.path),
        role=role,
        format=image.format,
        format_declared=image.format_declared,
        virtual_size=image.guest_size or 0,
        file_size=image.file_size,
        cluster_size=image.header.cluster_size if image.header else None,
        bitmaps=len(image.bitmaps),
        parent=parent,
        notes=image.notes,
    )


def _directions(facts: MergeFacts) -> Directions:
    return Directions(
        commit=DirectionCost(
            bytes_to_copy=bytes_to_copy(facts),
            available=True,
            reason="what top defines goes down into base",
        ),
        pull=DirectionCost(
            bytes_to_copy=facts.pull_bytes,
            available=facts.pull_obstacle is None,
            reason=facts.pull_obstacle or "what only base defines is pulled up into top",
        ),
        chosen=facts.direction,
    )


def _planned_bitmap(decision: Decision, facts: MergeFacts) -> PlannedBitmap:
    bits = facts.final_bits.get(decision.name)
    images = [str(image.path) for image in facts.chain.images]
    return PlannedBitmap(
        name=decision.name,
        fate=decision.fate,
        rule=decision.rule,
        reason=decision.reason,
        tombstone=decision.tombstone,
        granularity=decision.granularity,
        dirty_bytes=bits.dirty_bytes() if bits is not None else None,
        was_valid=decision.was_valid,
        unguarded=decision.unguarded,
        states=dict(zip(images, map(str, decision.states), strict=True)),
        recovered=decision.name in facts.recovered,
    )


def _hides(facts: MergeFacts) -> PlannedHiding | None:
    hiding = facts.hiding
    if hiding is None or facts.merged:
        return None
    overlay = hiding.overlay
    return PlannedHiding(str(overlay.path), hiding.start, overlay.virtual_size, hiding.required)


def _other_users(facts: MergeFacts) -> tuple[str, ...]:
    """The images outside the chain that stand on one of it, from base up."""
    relatives = facts.relatives
    found = (*relatives.siblings, *relatives.middle_children, *relatives.children)
    return tuple(str(image.path) for image in found)
