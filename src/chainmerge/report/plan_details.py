# SPDX-License-Identifier: Apache-2.0
"""Everything that a merge plan says, below its answer: what ``--verbose`` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from chainmerge.arithmetic.counting import counted
from chainmerge.documents.plan import (
    DirectionCost,
    EngineName,
    MergePlan,
    PlannedBitmap,
    PlannedImage,
    PlannedSnapshots,
)
from chainmerge.options import Placement
from chainmerge.report import layout
from chainmerge.report.layout import Block, Stack, Words, joined, stack, words
from chainmerge.report.map_strip import strip_of_plan
from chainmerge.report.names import names_in, names_of_plan
from chainmerge.report.plan_tables import (
    ROLE_STYLES,
    answer,
    disks_answer,
    mark,
)
from chainmerge.report.text import exact_size, human_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from chainmerge.documents.disk_map import DiskMap
    from chainmerge.documents.disks import DisksPlan
    from chainmerge.documents.images import Searched


_FATE_STYLES: Final[Mapping[str, str]] = {
    "keep": layout.GOOD,
    "prune": layout.CAUTION,
    "drop": layout.BAD,
    "ignore": layout.QUIET,
}
_PLACEMENTS = {
    Placement.COW: "data goes to new clusters, even where base has one already (cow)",
    Placement.IN_PLACE: (
        "data goes over the old content where base has a cluster already (in-place)"
    ),
}
_REQUIRED = {
    EngineName.NATIVE: "while merging",
    EngineName.QEMU: "while merging, at most",
}
_SNAPSHOTS_LISTED: Final = 20
_OF_POOL = "at most: what the volume has already counts too, as LVM snapshots may share it"
_HIDDEN = "behind base's end, with zeros in the overlay, before the volume is extended"
_PRUNED_FIRST = "stale bitmaps are removed first, in a switch of their own, to make room"


def plan_details(plan: MergePlan, command: str, drawn: DiskMap | None = None) -> Block:
    """The answer of a plan, and then everything that it says; arguments as of its first screen."""
    return stack(
        *answer(plan, names_of_plan(plan), command),
        *((layout.pairs(strip_of_plan(drawn, plan), layout.TITLE),) if drawn else ()),
        *_sections(plan),
    )


def disks_plan_details(plan: DisksPlan, command: str) -> Block:
    """The answer of the plans of several disks, and then everything that each says."""
    names = names_in([path for disk in plan.disks for path in (disk.base, disk.top)])
    parts: list[Block] = [*disks_answer(plan, names, command)]
    for disk in plan.disks:
        parts += [words(""), words(f"{disk.top} into {disk.base}", layout.TITLE), *_sections(disk)]
    return stack(*parts)


def others_section(plan: MergePlan) -> Stack:
    """Which other images use those of the chain, and where they were looked for."""
    found = ", ".join(plan.other_users) or "none found"
    return layout.section("Other images that use these", words(found), *search_lines(plan.searched))


def search_lines(searched: Searched) -> Iterator[Block]:
    """How far a search for users of images went."""
    yield words(f"only these places were searched: {searched.places}", layout.QUIET)
    for left_out in searched.left_out:
        yield words(f"not searched: {left_out}", layout.CAUTION)
    if searched.sole_user:
        yield words("there are no others, as --sole-user says", layout.QUIET)


def _sections(plan: MergePlan) -> Iterator[Block]:
    yield layout.section("Chain, leaf first", *_chain(plan))
    yield layout.section("What moves", _movement(plan))
    yield layout.section("Bitmaps", _bitmaps(plan.bitmaps))
    if plan.snapshots:
        yield layout.section("Internal snapshots", _snapshots(plan.snapshots))
    yield layout.section("Space", _space(plan))
    afterwards = tuple(_afterwards(plan))
    if afterwards:
        yield layout.section("Afterwards", layout.bullets(afterwards))
    yield others_section(plan)
    yield from layout.warnings_section(plan.warnings)


def _chain(plan: MergePlan) -> Iterator[Block]:
    for image in reversed(plan.images):
        style = ROLE_STYLES.get(image.role, "")
        yield joined(words(image.path, style), words(mark(image, plan), layout.QUIET))
        yield layout.indented(words(_about(image), layout.QUIET))
        yield from (layout.indented(words(note, layout.CAUTION)) for note in image.notes)


def _about(image: PlannedImage) -> str:
    declared = "" if image.format_declared else " (not declared)"
    about = [
        f"{image.role}: {image.format}{declared}",
        f"disk {human_size(image.virtual_size)}",
        f"file {human_size(image.file_size)}",
        counted(image.bitmaps, "bitmap"),
    ]
    if image.cluster_size is not None:
        about.insert(3, f"clusters {human_size(image.cluster_size)}")
    return ", ".join(about)


def _movement(plan: MergePlan) -> Stack:
    movement, directions = plan.movement, plan.directions
    rows: list[tuple[str, int | None, str]] = [
        ("data", movement.data_bytes, ""),
        *((("shared, not copied", plan.shared_bytes, ""),) if plan.shared_bytes else ()),
        ("zeros", movement.zero_bytes, ""),
        ("compressed", movement.compressed_bytes, ""),
    ]
    if plan.virtual_size_after != plan.virtual_size_before:
        was = f"was {exact_size(plan.virtual_size_before)}"
        rows.append((f"{_written(plan)}'s disk becomes", plan.virtual_size_after, was))
    costs = layout.listing(
        ("direction", "copies", "bytes", ""),
        (
            _cost(name, cost, is_chosen=name == directions.chosen)
            for name, cost in (("commit", directions.commit), ("pull", directions.pull))
        ),
        right=("copies", "bytes"),
    )
    allocations = (
        f"{_written(plan)} allocates {counted(movement.new_clusters, 'cluster')}"
        f" and {counted(movement.new_l2_tables, 'mapping table')}"
    )
    return stack(
        layout.sizes(rows),
        words(allocations, layout.QUIET),
        layout.EMPTY_LINE,
        costs,
        layout.EMPTY_LINE,
        words(f"engine {plan.engine}: {plan.engine_reason}"),
        words(f"verification: {plan.verify}"),
    )


def _cost(name: str, cost: DirectionCost, *, is_chosen: bool) -> tuple[Words, ...]:
    style = layout.GOOD if is_chosen else "" if cost.available else layout.QUIET
    return (
        words(f"{name} (chosen)" if is_chosen else name, style),
        layout.size(cost.bytes_to_copy),
        layout.number(cost.bytes_to_copy),
        words(cost.reason, layout.QUIET),
    )


def _bitmaps(bitmaps: tuple[PlannedBitmap, ...]) -> Block:
    if not bitmaps:
        return words("none", layout.QUIET)
    table = layout.listing(
        ("name", "fate", "granularity", "dirty", "reason"),
        map(_bitmap_row, bitmaps),
        right=("granularity", "dirty"),
    )
    kept = sum(bitmap.fate == "keep" for bitmap in bitmaps)
    lost = sum(bitmap.is_lost for bitmap in bitmaps)
    summary = f"{kept} of {counted(len(bitmaps), 'bitmap')} kept"
    if lost:
        summary += f", {lost} lost that could have served a backup"
    return stack(table, words(summary, layout.BAD if lost else layout.QUIET))


def _bitmap_row(bitmap: PlannedBitmap) -> tuple[Words, ...]:
    fate = f"{bitmap.fate}, tombstone" if bitmap.tombstone else bitmap.fate
    return (
        words(bitmap.name),
        words(fate, _FATE_STYLES.get(bitmap.fate, "")),
        layout.size(bitmap.granularity),
        layout.size(bitmap.dirty_bytes),
        words("; ".join(_remarks(bitmap))),
    )


def _snapshots(snapshots: tuple[PlannedSnapshots, ...]) -> Block:
    return layout.listing(("image", "snapshot", "fate"), _snapshot_rows(snapshots))


def _snapshot_rows(snapshots: tuple[PlannedSnapshots, ...]) -> Iterator[tuple[Words, ...]]:
    for image in snapshots:
        given_back = f", {human_size(image.freed)} given back" if image.freed else ""
        for names, fate, style in (
            (image.kept, "shows what it showed", layout.GOOD),
            (image.lost, "would show other data, or be deleted", layout.BAD),
            (image.dropped, f"deleted{given_back}", layout.CAUTION),
        ):
            for name in names[:_SNAPSHOTS_LISTED]:
                yield words(image.image), words(name), words(fate, style)
            more = len(names) - _SNAPSHOTS_LISTED
            if more > 0:
                yield words(image.image), words(f"{more} more"), words(fate, style)


def _remarks(bitmap: PlannedBitmap) -> Iterator[str]:
    yield bitmap.reason
    if bitmap.unguarded:
        yield "nothing in base will keep it from passing for a valid one"
    if bitmap.recovered:
        yield "its bits come from the bitmaps that the interrupted run saved"


def _space(plan: MergePlan) -> Stack:
    space = plan.space
    rows: list[tuple[str, int | None, str]] = [
        ("size now", space.size, ""),
        ("used up to", space.image_end, ""),
        ("needed", space.required, _REQUIRED[plan.engine]),
    ]
    if space.limit is not None:
        rows.append(("may become", space.limit, ""))
    if plan.hides is not None:
        rows.append(("hidden before", plan.hides.end - plan.hides.start, _HIDDEN))
    if space.grow_to is not None:
        by = f"{human_size(space.grow_to - space.size)} more, before anything is written"
        rows.append(("will be extended to", space.grow_to, by))
    if space.pool is not None:
        rows.append(("taken of the pool", space.allocates, _OF_POOL))
        rows.append(("free in the pool", space.pool.free, space.pool.name))
        rows.append(("free for its metadata", space.pool.metadata_free, ""))
        if space.pool.extend_by:
            rows.append(("pool extended by", space.pool.extend_by, "before anything is written"))
    if space.missing:
        rows.append(("MISSING", space.missing, ""))
    if space.shrink_to is not None:
        rows.append(("will be reduced to", space.shrink_to, "once everything is verified"))
    place = f"{_written(plan)} is a file"
    if space.kind != "file":
        place = f"{_written(plan)} lies on a {space.kind} volume"
    data = _PLACEMENTS[space.placement]
    breakdown: list[tuple[str, int | None, str]] = [
        (name.replace("_", " "), value, "") for name, value in space.breakdown.items()
    ]
    return stack(
        words(place),
        layout.sizes(rows),
        *((words(f"where {data}", layout.QUIET),) if plan.engine == EngineName.NATIVE else ()),
        *((words(_PRUNED_FIRST, layout.CAUTION),) if space.prune_first else ()),
        *((words("of which", layout.QUIET), layout.sizes(breakdown)) if breakdown else ()),
    )


def _written(plan: MergePlan) -> str:
    """What to call the image that is written."""
    return "top" if plan.pulls else "base"


def _afterwards(plan: MergePlan) -> Iterator[str]:
    for repoint in plan.repoint:
        yield (
            f"{repoint.child} uses {repoint.new_backing} ({repoint.new_format}) as its backing "
            f"file, in place of {repoint.old_backing}"
        )
    for path in plan.delete:
        yield f"{path} is deleted"
    if plan.rename is not None:
        old, new = plan.rename
        yield f"{old} is renamed to {new}, and takes its place"
