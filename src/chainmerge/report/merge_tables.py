# SPDX-License-Identifier: Apache-2.0
"""What a merge did, for people: what is done, what is left lying there, what is to be done now."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from chainmerge.arithmetic.counting import counted
from chainmerge.documents.merge import MergeOutcome, MergeReport
from chainmerge.documents.plan import MUST_NOT_BE_USED, MergePlan, Role
from chainmerge.report import layout
from chainmerge.report.layout import Block, Stack, Words, stack, words
from chainmerge.report.names import (
    ImageNames,
    disks_left_out,
    listed,
    names_in,
    names_of_plan,
    users_line,
)
from chainmerge.report.text import rough_size, short_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from chainmerge.documents.bitmaps import BitmapResult
    from chainmerge.documents.disks import DiskReport, DisksReport

# Proxmox VE has the images of each machine in a directory that is called by its number.
_OF_PROXMOX: Final = re.compile(r"/images/(\d+)/([^/]+)$")


def merge_report(report: MergeReport) -> Block:
    """What a merge of closed images did, and what to do now."""
    return stack(*_merge_lines(report, _names_of(report)), *_new_leaves([report]))


def live_merge_report(report: MergeReport) -> Block:
    """What a merge in a running VM did. The VM reads base by now, if it read top before."""
    return stack(*_merge_lines(report, _names_of(report)))


def merge_details(report: MergeReport) -> Block:
    """The same as :func:`merge_report`, and everything else that was found."""
    return stack(merge_report(report), *_details(report))


def live_merge_details(report: MergeReport) -> Block:
    """The same as :func:`live_merge_report`, and everything else that was found."""
    return stack(live_merge_report(report), *_details(report))


def disks_report(report: DisksReport) -> Block:
    """What happened to each of several disks, in one table; what is to be done, below."""
    merged = [disk.report for disk in report.disks if disk.report is not None]
    return stack(*_disks_lines(report), *_new_leaves(merged), *_the_rest(report))


def live_disks_report(report: DisksReport) -> Block:
    """The same of disks of a running VM, which reads base by now, if it read top before."""
    return stack(*_disks_lines(report), *_the_rest(report))


def _disks_lines(report: DisksReport) -> Iterator[Block]:
    names = names_in([path for disk in report.disks for path in (_top_of(disk), disk.base)])
    done = sum(disk.is_done for disk in report.disks)
    table = layout.listing(
        ("disk", "into", "outcome", "copied", "frees"),
        (_disklisted(disk, names) for disk in report.disks),
        right=("copied", "frees"),
    )
    summary = f"{done} of {counted(len(report.disks), 'disk')} merged{names.place}"
    yield words(summary, layout.GOOD if done == len(report.disks) else layout.BAD)
    yield layout.indented(table)
    yield from disks_left_out(report.left_out)
    merged = [disk.report for disk in report.disks if disk.report is not None]
    yield from _left_behind(merged, names)
    for disk in report.disks:
        yield from reasons_not_done(disk, names)
    for one in merged:
        yield from warnings_of(one, names)


def _the_rest(report: DisksReport) -> Iterator[Block]:
    if not all(disk.is_done for disk in report.disks):
        yield words("The same command does the rest.")


def disks_details(report: DisksReport) -> Block:
    """The same as :func:`disks_report`, and everything else that was found of each disk."""
    return stack(disks_report(report), *_each_disk(report, merge_details))


def live_disks_details(report: DisksReport) -> Block:
    """The same as :func:`live_disks_report`, and everything else that was found of each disk."""
    return stack(live_disks_report(report), *_each_disk(report, live_merge_details))


def _each_disk(report: DisksReport, details: Callable[[MergeReport], Block]) -> Iterator[Block]:
    for disk in report.disks:
        if disk.report is not None:
            yield from (words(""), words(disk.top, layout.TITLE), details(disk.report))


def _disklisted(disk: DiskReport, names: ImageNames) -> tuple[Words, ...]:
    style = layout.GOOD if disk.is_done else layout.BAD
    copied = freed = ""
    if disk.report is not None:
        copied = short_size(bytes_moved(disk.report))
        freed = "" if disk.report.plan is None else short_size(disk.report.plan.freed_bytes)
    places = words(names.of(_top_of(disk))), words(_where_to(disk, names))
    return *places, words(disk.outcome, style), words(copied), words(freed)


def _where_to(disk: DiskReport, names: ImageNames) -> str:
    """What the disk's overlay was merged into; of a pull, what has come up into the overlay."""
    plan = None if disk.report is None else disk.report.plan
    base = names.of(disk.base)
    return f"itself, from {base}" if plan is not None and plan.pulls else base


def _top_of(disk: DiskReport) -> str:
    plan = None if disk.report is None else disk.report.plan
    return disk.top if plan is None else plan.top


def reasons_not_done(disk: DiskReport, names: ImageNames) -> Iterator[Block]:
    """Why a merge that is one of several was not done, if it was not."""
    if disk.error is not None:
        yield words(f"{names.of(disk.top)}: {disk.error.message}", layout.BAD)
        yield from layout.way_out(disk.error.hint, disk.error.code)
    elif disk.report is None:
        yield words(f"{names.of(disk.top)}: this run has changed nothing", layout.QUIET)


def _names_of(report: MergeReport) -> ImageNames:
    return ImageNames("") if report.plan is None else names_of_plan(report.plan)


def _merge_lines(report: MergeReport, names: ImageNames) -> Iterator[Block]:
    yield words(_headline(report, names), layout.GOOD)
    if report.outcome == MergeOutcome.MERGED:
        yield words(_speed(report))
    for path in _first_two(report.repointed):
        yield words(f"{names.of(path)} now uses {_result(report, names)} as its backing file")
    if report.deleted:
        freed = 0 if report.plan is None else report.plan.freed_bytes
        freeing = f", which frees {short_size(freed)}" if freed else ""
        yield words(f"Deleted: {names.of_all(report.deleted)}{freeing}")
    if report.renamed is not None:
        old, new = report.renamed
        replaced = "and has replaced the file that was there"
        yield words(f"{names.of(old)} is now called {names.of(new)}, {replaced}")
    if report.bitmaps:
        yield words(f"Bitmaps: {listed([_bitmap(one) for one in report.bitmaps])}")
    yield from _left_behind([report], names)
    if report.plan is not None:
        yield users_line(report.plan, names)
    yield from warnings_of(report, names)


def _first_two(paths: tuple[str, ...]) -> tuple[str, ...]:
    return paths if len(paths) < 3 else (f"{paths[0]} and {len(paths) - 1} others",)


def _result(report: MergeReport, names: ImageNames) -> str:
    return "base" if report.plan is None else names.of(report.plan.result)


def _headline(report: MergeReport, names: ImageNames) -> str:
    plan = report.plan
    if plan is None:
        return "Done: merged and verified by an earlier run, which left the rest to this one"
    top, base = names.of(plan.top), names.of(plan.base)
    if report.outcome == MergeOutcome.ALREADY_MERGED:
        return f"Done: {top} was already merged into {base}{names.place}; verified again"
    if plan.pulls:
        return f"Done: {base} is pulled up into {top}{names.place}"
    return f"Done: {top} is merged into {base}{names.place}"


def bytes_moved(report: MergeReport) -> int:
    """Bytes that a merge has copied; what the result shares is left out."""
    shared = 0 if report.plan is None else report.plan.shared_bytes
    return max(0, report.bytes_copied - shared)


def _speed(report: MergeReport) -> str:
    """How much was copied at which rate, what verified it, and how long all of it took."""
    copied = bytes_moved(report)
    shared = report.bytes_copied - copied
    said = [f"{short_size(shared)} shared"] if shared else []
    if copied or not shared:
        rate = f" ({rough_size(copied / report.copy_seconds)}/s)" if report.copy_seconds else ""
        said.append(f"{short_size(copied)} copied{rate}")
    checks = f"; {counted(len(report.verified), 'check')} passed" if report.verified else ""
    return f"{', '.join(said)}{checks}; {report.seconds:.1f} s in all"


def _bitmap(bitmap: BitmapResult) -> str:
    dirty = "" if bitmap.dirty_bytes is None else f"{short_size(bitmap.dirty_bytes)} dirty"
    state = "tombstone" if bitmap.tombstone else "" if bitmap.state == "valid" else bitmap.state
    about = ", ".join(filter(None, (state, dirty)))
    return f"{bitmap.name} ({about})" if about else bitmap.name


def _left_behind(reports: Sequence[MergeReport], names: ImageNames) -> Iterator[Words]:
    """The images that are still there although nobody is to use them any more."""
    unneeded: list[str] = []
    wrong: list[str] = []
    spent: list[str] = []
    for report in reports:
        if report.plan is None:
            continue
        gone = {*report.deleted, *(report.renamed or ())}
        there = [image for image in report.plan.images if image.path not in gone]
        middles = [names.of(image.path) for image in there if image.role is Role.MIDDLE]
        if report.plan.pulls:
            unneeded += [names.of(image.path) for image in there if image.role is Role.BASE]
            unneeded += middles
            continue
        wrong += middles
        spent += [names.of(image.path) for image in there if image.role is Role.TOP]
    if unneeded:
        images = listed([*dict.fromkeys(unneeded)])
        yield words(f"Left as before, no longer needed by the disk: {images}")
    if wrong:
        yield words(
            f"Left there, never boot from them (wrong data): {listed(wrong)}", layout.CAUTION
        )
    if spent:
        yield words(
            f"Left there, not to be booted once base changes: {listed(spent)}", layout.CAUTION
        )


def warnings_of(report: MergeReport, names: ImageNames) -> Iterator[Words]:
    """What a report warns of, but for what is said of images that are left behind."""
    # What must not be used any more is among what is left behind.
    told = [warning for warning in report.warnings if MUST_NOT_BE_USED not in warning]
    # In full: nobody can ask for them again.
    for warning in told:
        yield words(f"Warning: {names.left_out_of(warning)}", layout.CAUTION)


def _new_leaves(reports: Iterable[MergeReport]) -> Iterator[Words]:
    """What the configuration of the VM has to name now, if its disk was top."""
    plans = [one.plan for one in reports if one.plan is not None and not one.renamed]
    plans = [plan for plan in plans if plan.leaves == (plan.top,) and not plan.pulls]
    if not plans:
        return
    yield words("The VM's configuration must now name:")
    for plan in plans:
        yield layout.command(f"  {plan.base} ({_format_of_base(plan)})")
    for how in dict.fromkeys(map(_how_to_name, plans)):
        yield layout.command(f"  {how}")


def _format_of_base(plan: MergePlan) -> str:
    return next((image.format for image in plan.images if image.path == plan.base), "")


def _how_to_name(plan: MergePlan) -> str:
    of_proxmox = _OF_PROXMOX.search(plan.base)
    if of_proxmox is not None:
        machine, name = of_proxmox.groups()
        return f"qm set {machine} --DISK STORAGE:{machine}/{name}"
    return "libvirt: virsh edit DOMAIN"


def _details(report: MergeReport) -> Iterator[Block]:
    # Imported where they are used: few reports are shown in full.
    from chainmerge.report.bitmap_tables import held_bitmaps  # noqa: PLC0415
    from chainmerge.report.plan_details import others_section  # noqa: PLC0415

    yield layout.section(
        "Space",
        layout.sizes([("size", report.volume_size, ""), ("used up to", report.image_end, "")]),
    )
    result = "top" if report.plan is not None and report.plan.pulls else "base"
    yield layout.section(f"Bitmaps of {result}", held_bitmaps(report.bitmaps))
    yield from _listed("Verified", report.verified)
    if report.plan is not None:
        yield others_section(report.plan)
    yield from layout.warnings_section(report.warnings)


def _listed(title: str, sentences: Iterable[str]) -> tuple[Stack, ...]:
    lines = tuple(sentences)
    return (layout.section(title, layout.bullets(lines)),) if lines else ()
