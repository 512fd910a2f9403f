# SPDX-License-Identifier: Apache-2.0
"""What the user who requested a merge should know."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.arithmetic.counting import counted
from chainmerge.chain.unseen_users import inactive_users, volumes
from chainmerge.documents.plan import MUST_NOT_BE_USED
from chainmerge.options import Direction
from chainmerge.planning.aftermath import changed_images, planned_snapshots, removed_images
from chainmerge.planning.facts import ImageTimes, MergeFacts, is_later
from chainmerge.planning.refusals import newer_base
from chainmerge.planning.wording import (
    NAMED_ONE_BY_ONE,
    first_few,
    local_time,
    names_of,
    run_of_images,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.options import MergeOptions


def find_warnings(facts: MergeFacts, options: MergeOptions) -> Iterator[str]:
    base, top = facts.base, facts.top
    if top.virtual_size < base.virtual_size and facts.direction is Direction.COMMIT:
        yield (
            f"{top.path} has a smaller disk ({top.virtual_size} bytes) than {base.path} "
            f"({base.virtual_size} bytes): base does not shrink, so the merged disk has the larger "
            "size"
        )
    middle = facts.merged_images[:-1]
    if middle and not options.delete and facts.direction is Direction.COMMIT:
        names = run_of_images(middle)
        yield f"after the merge {names} {MUST_NOT_BE_USED}: the data underneath has changed"
    yield from _what_stays(facts, options)
    revealed = tuple(image for image in facts.merged_images if image.encrypted)
    if revealed and not facts.result.encrypted:
        yield (
            f"{facts.result.path} is not encrypted: what {names_of(revealed)} holds can be read "
            "there"
        )
    for path, reason in facts.relatives.unreadable:
        yield f"{path} could be another user of these images, but cannot be read: {reason}"
    changed = changed_images(facts, options)
    if facts.relatives.inactive and not any(inactive_users(changed, top, facts.relatives)):
        yield f"{volumes(facts.relatives)} could use these images: not examined"
    yield from _doubts(facts, options)
    yield from _leaks(facts)
    for views in facts.snapshots:
        dropped = planned_snapshots(views, facts, options).dropped
        if dropped:
            nouns, verb = ("snapshot", "is") if len(dropped) == 1 else ("snapshots", "are")
            yield f"the internal {nouns} {first_few(dropped)} of {views.image.path} {verb} deleted"


def _what_stays(facts: MergeFacts, options: MergeOptions) -> Iterator[str]:
    """What the user might expect to be gone, but is kept."""
    if options.keep_name and not options.delete and facts.direction is Direction.PULL:
        what = "stays as it is" if len(facts.merged_images) == 1 else "stay as they are"
        yield f"{run_of_images(facts.merged_images)} {what}: --delete deletes what was pulled up"
    for image in removed_images(facts, options):
        known = facts.removals.belongings.get(image.identity)
        if known is None:
            continue
        if known.kept_data_file is not None:
            yield known.kept_data_file
        elif known.data_file is not None and not options.delete:
            yield f"{known.data_file}, the data file of {image.path}, is kept: --delete deletes it"


def _doubts(facts: MergeFacts, options: MergeOptions) -> Iterator[str]:
    """Signs that one of the images may be the wrong one, if they have no innocent reason."""
    evidence = facts.evidence
    if evidence is None or any(True for _ in newer_base(facts, options)):
        return
    base, top = facts.base.path, facts.top.path
    misfits = evidence.misfits
    signs = [_misfit(lower, upper) for lower, upper in misfits[:NAMED_ONE_BY_ONE]]
    if len(misfits) > len(signs):
        signs.append(f"the same holds for {counted(len(misfits) - len(signs), 'more image')}")
    if evidence.holds_most:
        seen = f"{evidence.held} of {evidence.held + evidence.differing}"
        signs.insert(
            0, f"{base} already holds most clusters sampled from the images above it ({seen})"
        )
    if not signs:
        return
    untold = " (block devices have no times)" if evidence.is_timeless else ""
    later = ""
    if evidence.holds_most and evidence.equal is None and evidence.written_later:
        later = "; the merge compares everything, and is refused if anything differs"
    yield (
        f"{'; '.join(signs)}{untold}: if somebody has merged {top} before, or replaced {base}, the "
        "merge keeps the wrong data; a restore, a copy, a change of bitmaps or a commit of another "
        f"layer would also explain it{later}"
    )


def _misfit(lower: ImageTimes, upper: ImageTimes) -> str:
    signs = []
    for verb, below, above in (
        ("written", lower.written, upper.written),
        ("created", lower.created, upper.created),
    ):
        if is_later(below, above):
            signs.append(
                f"was {verb} ({local_time(below)}) after {upper.path} ({local_time(above)})"
            )
    if lower.virtual_size > upper.virtual_size:
        sizes = f"{lower.virtual_size} bytes) than {upper.path} ({upper.virtual_size} bytes"
        signs.append(f"has a larger disk ({sizes})")
    return f"{lower.path} {' and '.join(signs)}"


def _leaks(facts: MergeFacts) -> Iterator[str]:
    leaks, result = facts.leaks, facts.result.path
    if not leaks.others:
        return
    words = f"{result} has {counted(leaks.others, 'leaked byte')} of unknown origin"
    if leaks.sign is not None:
        words += (
            f"; they may be all that is left of the data that a lost L2 table mapped: {leaks.sign}"
        )
    if leaks.reclaimed:
        yield f"{words}. They are given back, as requested"
    elif leaks.sign is None:
        yield f"{words}. They stay; `chainmerge repair` shows what would give the space back"
    else:
        yield f"{words}. They stay; `chainmerge repair --reclaim` would destroy that"
