# SPDX-License-Identifier: Apache-2.0
"""Reports for people on images and bitmaps; those on merges are in modules of their own."""

from __future__ import annotations

import itertools
import shlex
from typing import TYPE_CHECKING

from chainmerge.arithmetic.counting import counted
from chainmerge.documents.repair import NO_DAMAGE, RepairFinding, RepairReport, UndoReport
from chainmerge.report import layout
from chainmerge.report.bitmap_tables import bitmap_table, held_bitmaps
from chainmerge.report.layout import Block, Stack, Table, Words, joined, stack, words
from chainmerge.report.map_strip import strip_of_chain
from chainmerge.report.plan_details import search_lines
from chainmerge.report.text import exact_size, human_size, moment, short_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from chainmerge.documents.bitmaps import (
        BitmapChange,
        BitmapListing,
        BitmapsOfDisks,
        PrunedBitmap,
        PruneOfDisks,
        PruneReport,
        SharedCheckpoint,
    )
    from chainmerge.documents.disk_map import DiskMap
    from chainmerge.documents.images import (
        BackingReport,
        ChainReport,
        CheckResult,
        ImageReport,
        RelinkReport,
    )
    from chainmerge.documents.merge import Measurement


def chain_report(report: ChainReport, drawn: DiskMap | None = None) -> Block:
    """An image, the images below it, and other images that use them; and the map of its disk."""
    nodes = [_node(image, report.image) for image in report.images]
    return stack(
        layout.tree(nodes),
        *((layout.pairs(strip_of_chain(drawn), layout.TITLE),) if drawn else ()),
        layout.section("Other images that use these", *search_lines(report.searched)),
        *layout.warnings_section(report.warnings),
    )


def check_report(result: CheckResult) -> Block:
    """What a consistency check found."""
    if result.clean:
        verdict = words(f"{result.image}: nothing is wrong", layout.GOOD)
    else:
        style = layout.BAD if result.corruptions else layout.CAUTION
        corruptions = counted(result.corruptions, "corruption")
        found = f"{corruptions}, {counted(result.leaks, 'leaked cluster')}"
        if result.remarks:
            found += f", {counted(len(result.remarks), 'remark')}"
        verdict = words(f"{result.image}: {found}", style)
    return stack(
        verdict,
        *((layout.bullets(result.messages),) if result.messages else ()),
        *((layout.bullets(result.remarks),) if result.remarks else ()),
        words(f"used up to {exact_size(result.image_end_offset)}", layout.QUIET),
    )


def measurement_report(measurement: Measurement) -> Block:
    """How large base must be."""
    rows: list[tuple[str, int | None, str]] = [
        ("required", measurement.required, "while merging"),
        ("optimal", measurement.optimal, "after the merge"),
        ("used up to", measurement.image_end, "today"),
        ("size", measurement.volume_size, "today"),
    ]
    breakdown: list[tuple[str, int | None, str]] = [
        (name.replace("_", " "), value, "") for name, value in measurement.breakdown.items()
    ]
    return stack(
        words(f"Merging {measurement.top} into {measurement.base}", layout.TITLE),
        layout.sizes(rows),
        *((layout.section("Required for", layout.sizes(breakdown)),) if breakdown else ()),
    )


def bitmap_listing(listing: BitmapListing) -> Block:
    """Every bitmap of a chain, and whether a backup can use each name."""
    if not listing.rows:
        return words(f"{listing.image} and the images below it hold no bitmaps", layout.QUIET)
    usable, unusable = words("usable", layout.GOOD), words("unusable", layout.BAD)
    verdicts = layout.listing(
        ("name", "for backups", "why"),
        (
            (words(verdict.name), usable if verdict.passes else unusable, words(verdict.reason))
            for verdict in listing.verdicts
        ),
    )
    by_image = itertools.groupby(listing.rows, key=lambda row: row.image)
    return stack(
        *(part for image, rows in by_image for part in (words(image), bitmap_table(rows))),
        layout.section("Checkpoints", verdicts),
        *_tombstone_note(listing),
        *_repair_note(listing),
    )


def bitmaps_of_disks(found: BitmapsOfDisks) -> Block:
    """The bitmaps of each disk, and which checkpoints a backup of all of them can use."""
    disks = map(bitmap_listing, found.disks)
    return stack(*disks, *_shared_checkpoints(found.checkpoints))


def _shared_checkpoints(checkpoints: Sequence[SharedCheckpoint]) -> Iterator[Block]:
    if not checkpoints:
        return
    usable, unusable = words("usable", layout.GOOD), words("unusable", layout.BAD)
    table = layout.listing(
        ("name", "for a backup of all disks", "why not"),
        (
            (
                words(one.name),
                usable if one.usable else unusable,
                words("; ".join(f"{gap.image}: {gap.reason}" for gap in one.gaps)),
            )
            for one in checkpoints
        ),
    )
    yield layout.section("Checkpoints of all disks", table)


def bitmap_change(change: BitmapChange) -> Block:
    """What a change did to an image's bitmaps."""
    done = {"add": "added", "remove": "removed", "clear": "cleared", "merge": "merged into"}
    verb = done.get(change.action, change.action)
    return stack(
        words(f"{change.image}: {verb} {', '.join(change.names) or 'nothing'}"),
        held_bitmaps(change.bitmaps),
        *layout.warnings_section(change.warnings),
    )


def prune_report(report: PruneReport) -> Block:
    """Which bitmaps a pruning removed, and why."""
    if not report.removed:
        return words(f"no stale bitmaps between {report.base} and {report.top}", layout.GOOD)
    summary = f"{counted(len(report.removed), 'bitmap')} pruned, {len(report.kept)} kept"
    by_image = itertools.groupby(report.removed, key=lambda bitmap: bitmap.image)
    return stack(
        *(part for image, bitmaps in by_image for part in (words(image), _pruned_table(bitmaps))),
        words(summary, layout.QUIET),
    )


def prune_of_disks(report: PruneOfDisks) -> Block:
    """What was pruned on each disk, and which checkpoints are left for all of them."""
    return stack(*map(prune_report, report.disks), *_shared_checkpoints(report.checkpoints))


def repair_report(report: RepairReport) -> Block:
    """What is wrong with an image, what was or would be done about it, and what that costs."""
    if not report.findings:
        return stack(
            words(f"{report.image}: nothing to repair", layout.GOOD),
            *layout.warnings_section(report.warnings),
        )
    return stack(
        words(f"{report.image}: {counted(len(report.findings), 'finding')}"),
        layout.section("Found", _findings(report)),
        *_listed("Would be done" if report.dry_run else "Done", report.actions),
        *_listed("What it means for backups", report.consequences),
        *_listed("Verified", report.verified),
        *_listed("What was there before", _ways_back(report)),
        *layout.warnings_section(report.warnings),
        *_next_step(report),
    )


def backing_report(report: BackingReport) -> Block:
    """What an image names as its backing file, and which files could be a lost one."""
    declared = f" ({report.backing_format})" if report.backing_format else ""
    name = _backing_file(report.backing) + declared
    if report.problem is None:
        return words(f"{report.image} has {name}")
    parts: list[Block] = [
        words(f"{report.image} should have {name}"),
        words(report.problem, layout.BAD),
    ]
    if not report.candidates:
        note = (
            "No file was found that could be the missing one; --search DIR looks in other "
            "directories."
        )
        return stack(*parts, words(note, layout.QUIET))
    for candidate in report.candidates:
        about = f"{candidate.path} ({candidate.format})"
        parts += [words(about), layout.indented(layout.bullets(candidate.reasons))]
    image, first = shlex.quote(report.image), shlex.quote(report.candidates[0].path)
    note = f"If you know that this is the right file: `chainmerge relink {image} --backing {first}`"
    return stack(*parts, words(note, layout.QUIET))


def relink_report(report: RelinkReport) -> Block:
    """Which backing file an image has now."""
    return stack(
        words(f"{report.image} now has {_backing_file(report.backing)}", layout.GOOD),
        *_listed("Verified", report.verified),
        *layout.warnings_section(report.warnings),
    )


def _backing_file(name: str | None) -> str:
    return "no backing file" if name is None else f"the backing file {name}"


def undo_report(report: UndoReport) -> Block:
    """What was put back."""
    restored = exact_size(report.restored_bytes)
    return words(f"{report.image} is as it was before the repair: {restored} put back")


def _ways_back(report: RepairReport) -> Iterator[str]:
    if report.backup is not None:
        yield f"`chainmerge repair --undo {shlex.quote(report.backup)}` puts it back"


def _next_step(report: RepairReport) -> Iterator[Words]:
    if report.dry_run and report.actions:
        command = f"chainmerge repair --yes {shlex.quote(report.image)}"
        yield words(f"Nothing was changed. `{command}` does it.", layout.QUIET)


def _listed(title: str, sentences: Iterable[str]) -> tuple[Stack, ...]:
    lines = tuple(sentences)
    return (layout.section(title, layout.bullets(lines)),) if lines else ()


def _node(image: ImageReport, asked: str) -> layout.TreeNode:
    style = "bold" if image.path == asked else "" if image.in_chain else layout.QUIET
    declared = "" if image.format_declared else " (not declared)"
    about = [
        f"{image.format}{declared}",
        f"disk {human_size(image.virtual_size)}",
        f"file {human_size(image.file_size)}",
    ]
    if image.occupied_bytes is not None:
        about.append(f"takes {short_size(image.occupied_bytes)}")
    if image.allocated_bytes is not None:
        about.append(f"defines {human_size(image.allocated_bytes)}")
    if image.cluster_size is not None:
        about.append(f"clusters {human_size(image.cluster_size)}")
    about.append(counted(image.bitmaps, "bitmap"))
    about.append(counted(image.snapshots, "snapshot"))
    below = [words(", ".join(about), layout.QUIET)]
    below.append(joined(*_use(image)))
    if image.details:
        details = "; ".join(f"{name}: {value}" for name, value in image.details.items())
        below.append(words(details, layout.QUIET))
    below += (words(note, layout.CAUTION) for note in image.notes)
    return layout.TreeNode(image.path, image.parent, style, tuple(below))


def _use(image: ImageReport) -> Iterator[Words]:
    """When an image was written last, and who has it open."""
    if image.written_at is not None:
        yield words(f"written {moment(image.written_at)}, ", layout.QUIET)
    if image.users is None:
        yield words("open in: not known, as not every process may be looked at", layout.QUIET)
    elif image.users:
        users = ", ".join(f"{user.program or 'a process'} (pid {user.pid})" for user in image.users)
        yield words(f"open in {users}", layout.CAUTION)
    else:
        yield words("not open in any process", layout.QUIET)


def _pruned_table(bitmaps: Iterable[PrunedBitmap]) -> Block:
    rows = (
        (
            words(bitmap.name),
            words(bitmap.state, layout.STATE_STYLES.get(bitmap.state, "")),
            words("tombstone" if bitmap.tombstone else "gone"),
            words(bitmap.reason),
        )
        for bitmap in bitmaps
    )
    return layout.indented(layout.listing(("name", "was", "now", "reason"), rows))


def _tombstone_note(listing: BitmapListing) -> Iterator[Words]:
    if any(row.tombstone for row in listing.rows):
        yield words(
            "A tombstone is a disabled, empty bitmap that keeps the same name in images above from "
            "passing for a valid one.",
            layout.QUIET,
        )


def _repair_note(listing: BitmapListing) -> Iterator[Words]:
    """The way out of what is in-use, on the one screen that says so of a whole chain."""
    if any(row.state == "in-use" for row in listing.rows):
        yield words(
            "If no VM has these images open, and no merge is unfinished, the inconsistent bitmaps "
            "are lost: `chainmerge bitmaps repair LEAF`, LEAF being the active image, drops "
            "them from the whole chain.",
            layout.CAUTION,
        )


def _findings(report: RepairReport) -> Table:
    return layout.pairs(map(_finding, report.findings))


def _finding(finding: RepairFinding) -> tuple[Words, Words]:
    is_damage = not finding.repairable and finding.kind not in NO_DAMAGE
    style = layout.BAD if is_damage else layout.CAUTION
    remark = " (cannot be repaired here)" if is_damage else ""
    return words(finding.kind, style), words(f"{finding.sentence}{remark}")
