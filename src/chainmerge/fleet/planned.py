# SPDX-License-Identifier: Apache-2.0
"""What a plan comes to, whatever the action: what it does, to which images, and its digest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
from msgspec import Struct

from chainmerge.documents.bitmaps import BitmapListing
from chainmerge.documents.disks import DisksPlan
from chainmerge.documents.plan import MergePlan, Progress
from chainmerge.documents.repair import RepairReport
from chainmerge.documents.retention import ThinOutPlan
from chainmerge.fleet.digest import (
    images_merged_by,
    images_of_chain,
    live_plan_digest_of,
    plan_digest_of,
    short_digest_of,
)
from chainmerge.fleet.record import Action

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from chainmerge.fleet.record import JobRecord

JobPlan: TypeAlias = MergePlan | DisksPlan | ThinOutPlan | BitmapListing | RepairReport


class PlannedWork(Struct, frozen=True):
    """What counts of a plan.

    Attributes:
        digest: The same for two plans that do the same.
        is_new: Whether nothing of it has been begun, and there is something to do.
        bases: The image that each disk is merged into, or that is changed.
        changed: The images that are written to, renamed or deleted.
        held: The images of each disk that nobody else may change meanwhile.
        chains: The images of each disk from the root up to its top, where the plan has them.
        is_partly_done: Whether some of the merges are done, and nothing of the others is.
    """

    digest: str
    is_new: bool
    bases: tuple[str, ...]
    changed: tuple[str, ...]
    held: tuple[tuple[str, ...], ...]
    chains: tuple[tuple[str, ...], ...] = ()
    is_partly_done: bool = False


def plan_printed_for(record: JobRecord, printed: bytes) -> JobPlan:
    """Read the plan that a child has printed for a job; raises msgspec.DecodeError."""
    kind: Any = {
        Action.MERGE: MergePlan,
        Action.LIVE_MERGE: MergePlan,
        Action.THIN_OUT: ThinOutPlan,
        Action.PRUNE: BitmapListing,
        Action.REPAIR: RepairReport,
    }[record.action]
    if kind is MergePlan and len(record.disks) > 1:
        kind = DisksPlan
    plan: JobPlan = msgspec.json.decode(printed, type=kind)
    return plan


def work_of(plan: JobPlan, action: Action, bases: Sequence[str]) -> PlannedWork:
    """Return what counts of a plan.

    Args:
        plan: of any action.
        action: which.
        bases: of the disks of the job, for plans that do not say what they change.
    """
    digest_of_merge: Callable[[MergePlan], str] = (
        live_plan_digest_of if action is Action.LIVE_MERGE else plan_digest_of
    )
    match plan:
        case MergePlan():
            is_new = plan.progress is Progress.NEW
            changed = tuple(_changed_by(plan))
            chains = (images_of_chain(plan),)
            held = (images_held_by(plan),)
            return PlannedWork(digest_of_merge(plan), is_new, (plan.base,), changed, held, chains)
        case DisksPlan():
            return _together(plan.disks, list(map(digest_of_merge, plan.disks)))
        case ThinOutPlan():
            fates = [(one.image, one.stays) for one in plan.snapshots]
            found = _together(plan.ranges, [plan.leaf, fates, *map(plan_digest_of, plan.ranges)])
            chain = (*(one.image for one in plan.snapshots), plan.leaf)
            held = (tuple(path for each in found.held for path in each),)
            return msgspec.structs.replace(found, bases=tuple(bases), held=held, chains=(chain,))
        case BitmapListing():
            digest = short_digest_of([plan.rows, plan.verdicts])
            return _of_one_image(digest, bases, is_new=True)
        case RepairReport():
            digest = short_digest_of([plan.findings, plan.actions])
            return _of_one_image(digest, bases, is_new=bool(plan.actions))


def _of_one_image(digest: str, bases: Sequence[str], *, is_new: bool) -> PlannedWork:
    return PlannedWork(digest, is_new, tuple(bases), tuple(bases), (tuple(bases),))


def _together(plans: Sequence[MergePlan], what: object) -> PlannedWork:
    progress = {plan.progress for plan in plans}
    return PlannedWork(
        short_digest_of(what),
        progress == {Progress.NEW},
        tuple(plan.base for plan in plans),
        tuple(path for plan in plans for path in _changed_by(plan)),
        tuple(map(images_held_by, plans)),
        tuple(map(images_of_chain, plans)),
        progress == {Progress.NEW, Progress.MERGED},
    )


def images_held_by(plan: MergePlan) -> tuple[str, ...]:
    """Return the images that a merge changes or copies from."""
    return (*images_merged_by(plan), *_changed_besides(plan))


def _changed_by(plan: MergePlan) -> Iterator[str]:
    yield plan.result
    yield from plan.delete
    yield from plan.rename or ()
    yield from _changed_besides(plan)


def _changed_besides(plan: MergePlan) -> Iterator[str]:
    """The overlays that a merge writes to besides."""
    for child in plan.repoint:
        yield child.child
    if plan.hides is not None:
        yield plan.hides.image
