# SPDX-License-Identifier: Apache-2.0
"""A merge plan for people: the answer first, and what it rests on in a few lines below.

Everything else that a plan says is in :mod:`chainmerge.report.plan_details`.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Final

from chainmerge.arithmetic.counting import counted
from chainmerge.documents.plan import (
    EngineName,
    Finding,
    MergePlan,
    PlannedImage,
    PlannedPool,
    Prediction,
    Progress,
    Role,
    SpacePlan,
)
from chainmerge.report import layout
from chainmerge.report.layout import Block, Words, joined, stack, words
from chainmerge.report.map_strip import strip_of_plan
from chainmerge.report.names import (
    ImageNames,
    disks_left_out,
    listed,
    names_in,
    names_of_plan,
    places_searched,
    spanned,
    users_found,
    users_line,
)
from chainmerge.report.text import short_size, short_time, shortened

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from chainmerge.documents.disk_map import DiskMap
    from chainmerge.documents.disks import DisksPlan

ROLE_STYLES: Final[Mapping[Role, str]] = {
    Role.BASE: "bold cyan",
    Role.TOP: "bold magenta",
    Role.MIDDLE: "magenta",
}
_WARNINGS_SHOWN: Final = 3
_AFTERWARDS_SHOWN: Final = 3
# Fewer images than this are all shown.
_FEWEST_HIDDEN: Final = 4
_MORE: Final = "-v shows exact bytes, reasons and warnings in full"


def plan_report(plan: MergePlan, command: str, drawn: DiskMap | None = None) -> Block:
    """What would be merged, what that takes, and the command that does it; then the chain.

    Args:
        plan: the plan.
        command: what carries it out.
        drawn: the map of the disk, if there is one.
    """
    names = names_of_plan(plan)
    return stack(
        *answer(plan, names, command),
        layout.EMPTY_LINE,
        words("Chain, leaf first", layout.TITLE),
        layout.indented(_chain(plan, names)),
        layout.pairs(
            (*(strip_of_plan(drawn, plan) if drawn else ()), *_rest(plan, names)), layout.TITLE
        ),
        *((words(_MORE, layout.QUIET),) if plan.feasible else ()),
    )


def answer(plan: MergePlan, names: ImageNames, command: str) -> Iterator[Block]:
    """What a plan comes down to, in a few lines, and the command that carries it out."""
    yield _headline(plan, names)
    if gone := _gone(plan, names):
        yield words(gone)
    yield words(f"{_copies(plan)}; {_needs(plan)}")
    yield from time_taken([plan])
    yield words(_frees(plan, names))
    yield users_line(plan, names)
    if plan.refusals:
        yield from (part for refusal in plan.refusals for part in refused(refusal))
    else:
        yield from _command(plan.progress, command)


def _command(progress: Progress, command: str) -> Iterator[Block]:
    verb = "Finish it: " if progress is Progress.INTERRUPTED else "Do it: "
    yield layout.command_line(verb, command)


def refused(refusal: Finding) -> Iterator[Block]:
    """What refuses a merge, and what to do about it."""
    yield joined(words("REFUSED: ", layout.BAD), words(refusal.sentence))
    yield from layout.way_out(refusal.hint, refusal.code)


def _headline(plan: MergePlan, names: ImageNames) -> Words:
    top = words(names.of(plan.top), ROLE_STYLES[Role.TOP])
    base = words(names.of(plan.base), ROLE_STYLES[Role.BASE])
    if plan.progress is Progress.MERGED:
        return joined(words("Already merged: "), top, words(" into "), base, words(names.place))
    begun = "Finish an interrupted merge: " if plan.progress is Progress.INTERRUPTED else ""
    parts = (base, words(" up into "), top) if plan.pulls else (top, words(" into "), base)
    verb = "pull " if plan.pulls else "merge "
    verb = f"{begun}{verb}" if begun else verb.capitalize()
    return joined(words(verb), *parts, words(names.place))


def _gone(plan: MergePlan, names: ImageNames) -> str:
    """Which states of the disk nobody can go back to afterwards; empty if all stay."""
    above_base = [i.path for i in plan.images if i.role in (Role.MIDDLE, Role.TOP)]
    if not above_base or plan.progress is Progress.MERGED:
        return ""
    if plan.pulls and not plan.delete:
        return "All snapshots stay: the images below are not changed"
    called = spanned([names.of(path) for path in above_base])
    if len(above_base) == 1:
        return f"Gone then: the snapshot taken when {called} was created"
    return f"Gone then: the {len(above_base)} snapshots taken when {called} were created"


def _copies(plan: MergePlan) -> str:
    if plan.progress is Progress.MERGED:
        return "Copies nothing"
    copied = plan.bytes_copied
    if not plan.shared_bytes:
        return f"Copies {short_size(copied)}" if copied else "Copies nothing"
    rest = f"copies {short_size(copied)}" if copied else "copies nothing"
    return f"Shares {short_size(plan.shared_bytes)}, {rest}"


def bytes_needed(plan: MergePlan) -> int:
    """By how much the image that is written, or what it occupies, becomes larger."""
    space = plan.space
    return max(0, space.required - space.size) if space.allocates is None else space.allocates


def _needs(plan: MergePlan) -> str:
    space = plan.space
    most = "at most " if plan.engine is EngineName.QEMU else ""
    if space.kind == "file":
        needed = f"needs {most}{short_size(bytes_needed(plan))} while merging"
        if space.limit is None:
            return needed
        return f"{needed}, {short_size(max(0, space.limit - space.size))} free"
    if space.pool is not None:
        return _needs_of_pool(space, space.pool)
    has = f"of the volume's {short_size(space.size)}"
    needed = f"needs {most}{short_size(space.required)} {has} while merging"
    if space.grow_to is None:
        return needed
    return f"{needed}: it is extended to {short_size(space.grow_to)} first"


def _needs_of_pool(space: SpacePlan, pool: PlannedPool) -> str:
    takes = f"takes at most {short_size(space.allocates or 0)} of the thin pool's"
    needed = f"{takes} {short_size(pool.free)} free while merging"
    if not pool.extend_by:
        return needed
    return f"{needed}: the pool is extended by {short_size(pool.extend_by)} first"


def time_taken(plans: Sequence[MergePlan]) -> Iterator[Block]:
    """How long some merges take, one after the other.

    Nothing if one of them is refused, or nobody asked the history.
    """
    predictions = [
        plan.prediction for plan in plans if plan.feasible and plan.prediction is not None
    ]
    if predictions and len(predictions) == len(plans):
        yield words(f"Time: {_time_of(predictions)}")


def _time_of(predictions: Sequence[Prediction]) -> str:
    ends = [(one.seconds, one.at_least, one.at_most) for one in predictions]
    known = [(a, b, c) for a, b, c in ends if a is not None and b is not None and c is not None]
    merges = min(one.merges for one in predictions)
    if len(known) < len(ends):
        so_far = f" ({counted(merges, 'merge')} like this on this storage)" if merges else ""
        return f"no data yet{so_far}"
    likely, low, high = (short_time(sum(column)) for column in zip(*known, strict=True))
    return f"about {likely} ({low} to {high}), by {counted(merges, 'merge')} on this storage"


def _frees(plan: MergePlan, names: ImageNames) -> str:
    if plan.delete:
        what = f"{names.of_all(plan.delete)} {'is' if len(plan.delete) == 1 else 'are'} deleted"
        return f"Frees {short_size(plan.freed_bytes)}: {what}"
    if plan.freed_bytes:
        return f"Frees {short_size(plan.freed_bytes)}"
    # What others use cannot be deleted.
    if not plan.deletable_bytes or (plan.pulls and plan.other_users):
        return "Frees nothing"
    return f"Frees nothing; with --delete {short_size(plan.deletable_bytes)}"


def _chain(plan: MergePlan, names: ImageNames) -> Block:
    rows = [row for run in _runs(plan) for row in _rows_of(run, plan, names)]
    return layout.listing(("image", "role", "disk", "file", "bitmaps"), rows, right=("bitmaps",))


def _runs(plan: MergePlan) -> Iterator[list[PlannedImage]]:
    """The images from the leaf down; those in a row that are alike are together."""
    ends = {plan.images[0].path, *plan.leaves} if plan.images else set()
    leaf_first = reversed(plan.images)
    for _, run in groupby(leaf_first, key=lambda image: (image.role, image.path in ends)):
        yield list(run)


def _rows_of(
    run: Sequence[PlannedImage], plan: MergePlan, names: ImageNames
) -> Iterator[tuple[Words, ...]]:
    if len(run) >= _FEWEST_HIDDEN:
        hidden = words(f"... {len(run)} images ...", layout.QUIET)
        size = words(short_size(sum(image.file_size for image in run)))
        bitmaps = words(str(sum(image.bitmaps for image in run)))
        yield hidden, words(run[0].role), words(""), size, bitmaps
        return
    for image in run:
        name = words(names.of(image.path), ROLE_STYLES.get(image.role, ""))
        yield (
            joined(name, words(mark(image, plan), layout.QUIET)),
            words(image.role),
            words(short_size(image.virtual_size)),
            words(short_size(image.file_size)),
            words(str(image.bitmaps)),
        )


def mark(image: PlannedImage, plan: MergePlan) -> str:
    """What to say of an image that is at an end of the chain, behind its name."""
    if image.path == plan.images[0].path:
        return " (oldest)"
    return " (active)" if plan.leaves == (image.path,) else ""


def _rest(plan: MergePlan, names: ImageNames) -> Iterator[tuple[Words, Words]]:
    """What else to know: a word for it, and a line."""
    if plan.virtual_size_after != plan.virtual_size_before:
        sizes = f"{short_size(plan.virtual_size_before)} to {short_size(plan.virtual_size_after)}"
        yield words("Disk"), words(f"{names.of(plan.result)} grows from {sizes}")
    if plan.bitmaps:
        yield words("Bitmaps"), words(_fates(plan))
    for bitmap in plan.bitmaps:
        if bitmap.is_lost:
            reason = shortened(names.left_out_of(bitmap.reason))
            yield words("Lost", layout.BAD), words(f"{bitmap.name}: {reason}")
    for image in plan.snapshots:
        yield words("Snapshots"), words(_internal(image.image, image.dropped, image.lost, names))
    if plan.feasible:
        yield from _first_few("Afterwards", "", tuple(_afterwards(plan, names)), _AFTERWARDS_SHOWN)
    warnings = tuple(map(shortened, all_warnings(plan, names)))
    yield from _first_few("Warning", layout.CAUTION, warnings, _WARNINGS_SHOWN)


def _first_few(
    label: str, style: str, sentences: Sequence[str], shown: int
) -> Iterator[tuple[Words, Words]]:
    for number, sentence in enumerate(sentences[:shown]):
        yield words("" if number else label, style), words(sentence, style)
    if len(sentences) > shown:
        yield words(""), words(f"{len(sentences) - shown} more: see -v", style)


def all_warnings(plan: MergePlan, names: ImageNames) -> Iterator[str]:
    """What is out of the ordinary with a merge and with its images."""
    yield from map(names.left_out_of, plan.warnings)
    for image in plan.images:
        yield from (f"{names.of(image.path)}: {note}" for note in image.notes)


def _fates(plan: MergePlan) -> str:
    parts = []
    for fate, said in (("keep", "kept"), ("prune", "pruned"), ("drop", "dropped")):
        called = [bitmap.name for bitmap in plan.bitmaps if bitmap.fate == fate]
        if called:
            parts.append(f"{len(called)} {said} ({listed(called)})")
    lost = sum(bitmap.is_lost for bitmap in plan.bitmaps)
    if lost:
        parts.append(f"{lost} lost that could have served a backup")
    return ", ".join(parts) or "none of them is base's or top's"


def _internal(image: str, dropped: Sequence[str], lost: Sequence[str], names: ImageNames) -> str:
    """What becomes of the internal snapshots of an image."""
    said = [f"deleted: {listed(dropped)}"] if dropped else []
    if lost:
        said.append(f"would show other data or be deleted: {listed(lost)}")
    return f"in {names.of(image)}, {'; '.join(said) or 'all show what they showed'}"


def _afterwards(plan: MergePlan, names: ImageNames) -> Iterator[str]:
    yield from repointed(plan, names)
    if plan.rename is not None:
        old, new = plan.rename
        yield f"{names.of(old)} is renamed to {names.of(new)}, and replaces that file"
    if plan.space.shrink_to is not None:
        yield f"the volume is reduced to {short_size(plan.space.shrink_to)}"


def repointed(plan: MergePlan, names: ImageNames) -> Iterator[str]:
    """Which images get another backing file."""
    if len(plan.repoint) > 1 and len({one.new_backing for one in plan.repoint}) == 1:
        children = names.of_all([one.child for one in plan.repoint])
        yield f"{children} use {plan.repoint[0].new_backing} as their backing file"
        return
    for one in plan.repoint:
        yield f"{names.of(one.child)} uses {one.new_backing} as its backing file"


def disks_plan_report(plan: DisksPlan, command: str) -> Block:
    """What would be merged on several disks, in one table; what they have in common, once."""
    names = names_in([path for disk in plan.disks for path in (disk.base, disk.top)])
    return stack(
        *disks_answer(plan, names, command),
        layout.EMPTY_LINE,
        _disks_table(plan, names),
        layout.pairs(_rest_of_disks(plan, names), layout.TITLE),
        *((words(_MORE, layout.QUIET),) if plan.feasible else ()),
    )


def disks_answer(plan: DisksPlan, names: ImageNames, command: str) -> Iterator[Block]:
    """What the plans of several disks come down to, and the command that carries them out."""
    yield words(f"Merge {counted(len(plan.disks), 'disk')} as one{names.place}", layout.TITLE)
    yield from time_taken(plan.disks)
    searched = {places_searched(disk.searched, names): None for disk in plan.disks}
    others = {users_found(disk, names): None for disk in plan.disks}
    others = {one: None for one in others if one != "none found"} or {"none found": None}
    yield words(f"Other users: {', '.join(others)}; {'; '.join(searched)}")
    yield from disks_left_out(plan.left_out)
    if plan.feasible:
        yield from _command(Progress.NEW, command)
        return
    yield words("REFUSED: none of the disks was changed", layout.BAD)
    for finding, disks in _findings(plan, names).items():
        yield words(f"  {disks}{finding.sentence}")
        yield from layout.way_out(finding.hint, finding.code)


def _findings(plan: DisksPlan, names: ImageNames) -> Mapping[Finding, str]:
    """What refuses the merge of several disks, and of which of them."""
    found = dict.fromkeys(plan.refusals, "")
    for disk in plan.disks:
        found.update({one: f"{names.of(disk.top)}: " for one in disk.refusals if one not in found})
    return found


def _disks_table(plan: DisksPlan, names: ImageNames) -> Block:
    rows = [
        _disk_row(
            words(names.of(disk.top), ROLE_STYLES[Role.TOP]),
            words(names.of(disk.base), ROLE_STYLES[Role.BASE]),
            (disk.bytes_copied, disk.shared_bytes, bytes_needed(disk), disk.freed_bytes),
            _verdict(disk),
        )
        for disk in plan.disks
    ]
    sums = (
        sum(disk.bytes_copied for disk in plan.disks),
        plan.shared_bytes,
        sum(map(bytes_needed, plan.disks)),
        plan.freed_bytes,
    )
    rows.append(_disk_row(words("total", layout.TITLE), words(""), sums, words("")))
    headings = ("disk", "into", "copies", "shares", "grows", "frees", "verdict")
    sharing = bool(plan.shared_bytes)
    kept = [at for at, heading in enumerate(headings) if heading != "shares" or sharing]
    return layout.listing(
        [headings[at] for at in kept],
        [[row[at] for at in kept] for row in rows],
        right=("copies", "shares", "grows", "frees"),
    )


def _disk_row(disk: Words, into: Words, sizes: Iterable[int], verdict: Words) -> tuple[Words, ...]:
    return disk, into, *(words(short_size(size)) for size in sizes), verdict


def _verdict(disk: MergePlan) -> Words:
    if disk.refusals:
        return words("REFUSED", layout.BAD)
    said = {Progress.MERGED: "done before", Progress.INTERRUPTED: "goes on"}
    return words(said.get(disk.progress, "pull" if disk.pulls else "merge"), layout.GOOD)


def _rest_of_disks(plan: DisksPlan, names: ImageNames) -> Iterator[tuple[Words, Words]]:
    fates: dict[str, list[str]] = {}
    for disk in plan.disks:
        if disk.bitmaps:
            fates.setdefault(_fates(disk), []).append(names.of(disk.top))
    for fate, tops in fates.items():
        of_which = "each disk" if len(tops) == len(plan.disks) else listed(tops)
        yield words("Bitmaps"), words(f"{of_which}: {fate}")
    deleted = [path for disk in plan.disks for path in disk.delete]
    afterwards = [sentence for disk in plan.disks for sentence in _afterwards(disk, names)]
    if deleted:
        verb = "is" if len(deleted) == 1 else "are"
        afterwards.append(f"{names.of_all(deleted)} {verb} deleted")
    yield from _first_few("Afterwards", "", afterwards, 2 * _AFTERWARDS_SHOWN)
    warnings = {
        shortened(warning): None for disk in plan.disks for warning in all_warnings(disk, names)
    }
    yield from _first_few("Warning", layout.CAUTION, tuple(warnings), _WARNINGS_SHOWN)
