# SPDX-License-Identifier: Apache-2.0
"""What a merge would do: found out without a write, and without keeping a lock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from chainmerge.chain.opening import open_target
from chainmerge.chain.target import Target, find_target
from chainmerge.documents.merge import Measurement
from chainmerge.documents.plan import Finding, MergePlan
from chainmerge.documents.progress import never
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.options import Access, MergeOptions
from chainmerge.planning.already_merged import (
    base_changed_since,
    holds_content,
    merged_before,
    was_merged_before,
)
from chainmerge.planning.evidence import COMPARED_BY_A_PLAN, explained_by, weigh
from chainmerge.planning.foretelling import foretold
from chainmerge.planning.gathering import gather
from chainmerge.planning.locking import (
    images_wanted,
    images_written,
    locks_held,
    locks_needed,
    not_writable,
)
from chainmerge.planning.pivot import (
    LivePivotUnfinished,
    base_was_written_last,
    require_base_as_result,
)
from chainmerge.planning.placement import bytes_to_copy, chosen_space
from chainmerge.planning.plan import make_plan
from chainmerge.records.remains import read_remains
from chainmerge.records.saved_bitmaps import load_saved_bitmaps
from chainmerge.storage.bystanders import Wanted
from chainmerge.storage.errors import OpenFilesLimited
from chainmerge.storage.limits import allow_open_files
from chainmerge.storage.locks import contentions
from chainmerge.storage.other_hosts import shared_volumes
from chainmerge.storage.other_users import look_for_others

if TYPE_CHECKING:
    from chainmerge.errors import ChainmergeError
    from chainmerge.planning.facts import MergeFacts
    from chainmerge.records.live_journal import LiveJournal


def plan(
    top: str | Path,
    base: str | Path | None = None,
    access: Access | None = None,
    options: MergeOptions | None = None,
) -> MergePlan:
    """Say what a merge would do. Nothing is written and nothing stays locked.

    What would refuse the merge is in the plan's ``refusals``; only what keeps the chain from
    being read at all is raised.

    Raises:
        ChainmergeError: the chain cannot be found or read.
    """
    access, options = access or Access(), options or MergeOptions()
    target = find_target(Path(top), Path(base) if base is not None else None, access)
    return beside_others([plan_beside(target, access, options, {})])[0]


class Planned(Struct, frozen=True):
    """A merge as it would be done if nobody else used the images.

    Attributes:
        plan: What would be done.
        claim: Bytes that it would take, by the pool that they come from.
        images: What it would want of which images.
    """

    plan: MergePlan
    claim: Mapping[str, int]
    images: tuple[Wanted, ...]


def beside_others(planned: Sequence[Planned]) -> tuple[MergePlan, ...]:
    """The plans, with what others that use the images mean for them."""
    found = look_for_others([one.images for one in planned])
    return tuple(
        replace(
            one.plan,
            refusals=(
                *map(Finding.of, others.refusals),
                *one.plan.refusals,
            ),
            warnings=(*one.plan.warnings, *others.warnings),
        )
        for one, others in zip(planned, found, strict=True)
    )


def plan_beside(
    target: Target, access: Access, options: MergeOptions, claims: Mapping[str, int]
) -> Planned:
    """The plan of a merge that is done together with others; see :func:`beside_others`.

    Args:
        target: the images that it is about.
        access: as in :func:`plan`, and so are *options*.
        options: see there.
        claims: bytes that the others take, by the pool that they come from.
    """
    obstacles = tuple(_obstacles(target, access, options))
    remains = read_remains(target.base.real_path, target.chain.top.real_path)
    saved, record = remains.usable_saved, remains.record
    with open_target(target) as opened:
        facts = gather(target, opened, access, options, saved, never, claims).facts
        if not explained_by(remains, target):
            moved = bytes_to_copy(facts)
            evidence = weigh(target, opened, moved, never, COMPARED_BY_A_PLAN)
            facts = replace(facts, evidence=evidence)
        if was_merged_before(target, facts, record, options) and base_changed_since(record):
            equal = holds_content(target, opened, facts, options, never)
            obstacles += () if equal else (merged_before(target),)
    if remains.pivoted is not None:
        facts = _after_pivot(facts, remains.pivoted, target, access, options)
    decided = make_plan(replace(facts, obstacles=(*obstacles, *facts.obstacles)), options)
    decided = replace(decided, prediction=foretold(decided, options, live=False))
    claim = facts.volume.claim(decided.space.required, decided.space.allocates)
    return Planned(decided, claim, images_wanted(target, options))


def _after_pivot(
    facts: MergeFacts,
    journal: LiveJournal,
    target: Target,
    access: Access,
    options: MergeOptions,
) -> MergeFacts:
    """The facts, if a live merge has perhaps put the guest on base."""
    base_is_right = base_was_written_last(journal, target, access)
    if base_is_right is None:
        base, top = target.base.path, target.chain.top.path
        warning = (
            f"a live merge of {top} into {base} was about to take effect: the merge finds out "
            "whether the guest has written to base since, and copies nothing then"
        )
        return replace(facts, warnings=(*facts.warnings, warning))
    if not base_is_right:
        return facts
    try:
        require_base_as_result(journal, target, options)
    except LivePivotUnfinished as error:
        return replace(facts, obstacles=(error, *facts.obstacles))
    return replace(facts, merged=True, content_merged=True)


def measure(
    top: str | Path,
    base: str | Path | None = None,
    access: Access | None = None,
    options: MergeOptions | None = None,
) -> Measurement:
    """How large base must be for a merge, and will be after it.

    Raises:
        ChainmergeError: the chain cannot be found or read.
    """
    access, options = access or Access(), options or MergeOptions()
    target = find_target(Path(top), Path(base) if base is not None else None, access)
    saved = load_saved_bitmaps(target.base.real_path)
    with open_target(target) as opened:
        facts = gather(target, opened, access, options, saved, never, {}).facts
    space = chosen_space(facts, options)
    return Measurement(
        version=REPORT_VERSION,
        base=str(target.base.path),
        top=str(target.chain.top.path),
        required=space.required,
        optimal=space.optimal,
        image_end=space.image_end,
        volume_size=facts.volume.size,
        breakdown=dict(space.breakdown),
    )


def _obstacles(target: Target, access: Access, options: MergeOptions) -> Iterator[ChainmergeError]:
    """What would keep a merge from getting the images for itself, found without waiting."""
    try:
        allow_open_files(locks_held(target))
    except OpenFilesLimited as error:
        yield error
    yield from shared_volumes(images_written(target, options), access)
    locks = locks_needed(target, options)
    yield from contentions((image.path, mode) for image, mode in locks)
    yield from not_writable(target, options)
