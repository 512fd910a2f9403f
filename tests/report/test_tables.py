# SPDX-License-Identifier: Apache-2.0
"""The tables: that they say what they must, and nothing that a hostile name wants said."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.console import Console

from chainmerge.documents.merge import MergeOutcome
from chainmerge.documents.plan import Finding
from chainmerge.report import merge_tables, tables
from chainmerge.report.chains_table import chains_report
from chainmerge.report.plan_details import disks_plan_details, plan_details
from chainmerge.report.plan_tables import disks_plan_report, plan_report
from chainmerge.report.scan_table import scan_report
from chainmerge.report.status_table import status_report
from chainmerge.report.styled import styled
from tests.support import reports

if TYPE_CHECKING:
    from collections.abc import Callable

    from chainmerge.report.layout import Block

hostile_text = st.text(st.characters(exclude_categories=())) | st.sampled_from(
    ["[bold]x[/bold]", "[/]", "\x1b[31m", "\x1b]8;;http://x\x07", ":smile:", "a\nb", "\udcff"]
)
COMMAND = "chainmerge merge top.qcow2"
REFUSAL = Finding("not-enough-space", "7 bytes are missing", "make the volume larger")

HOSTILE_REPORTS: dict[str, Callable[[str], Block]] = {
    "plan": lambda t: plan_report(
        reports.plan(name=t, base=t, top=f"{t}2", words=t, refusals=(Finding(t, t, t),)), t
    ),
    "plan, feasible": lambda t: plan_report(reports.plan(name=t, base=t, top=f"{t}2", words=t), t),
    "plan, verbose": lambda t: plan_details(
        reports.plan(name=t, base=t, top=f"{t}2", words=t, refusals=(Finding(t, t, t),)), t
    ),
    "merge": lambda t: merge_tables.merge_report(
        reports.merge_report(reports.plan(base=t, top=t), name=t, words=t)
    ),
    "merge, verbose": lambda t: merge_tables.merge_details(
        reports.merge_report(reports.plan(base=t, top=t), name=t, words=t)
    ),
    "disks": lambda t: merge_tables.disks_report(reports.disks_report(top=t, words=t)),
    "disks, verbose": lambda t: merge_tables.disks_details(reports.disks_report(top=t, words=t)),
    "disks plan": lambda t: disks_plan_report(
        reports.disks_plan(name=t, base=t, top=t, words=t, refusals=(Finding(t, t, t),)), t
    ),
    "disks plan, verbose": lambda t: disks_plan_details(
        reports.disks_plan(name=t, base=t, top=t, words=t, refusals=(Finding(t, t, t),)), t
    ),
    "info": lambda t: tables.chain_report(reports.chain_report(image=t, words=t)),
    "chains": lambda t: chains_report(reports.chains_report(directory=t, words=t)),
    "scan": lambda t: scan_report(reports.scan_report(directory=t, words=t)),
    "check": lambda t: tables.check_report(reports.check_result(image=t, words=t)),
    "measure": lambda t: tables.measurement_report(reports.measurement(base=t, top=t)),
    "list": lambda t: tables.bitmap_listing(reports.bitmap_listing(image=t, name=t, words=t)),
    "change": lambda t: tables.bitmap_change(reports.bitmap_change(image=t, name=t)),
    "prune": lambda t: tables.prune_report(reports.prune_report(image=t, name=t, words=t)),
    "repair": lambda t: tables.repair_report(reports.repair_report(image=t, words=t)),
    "undo": lambda t: tables.undo_report(reports.undo_report(image=t)),
    "status": lambda t: status_report(reports.status_report(base=t, top=t, words=t)),
}


def rendered(report: Block, width: int = 4000) -> str:
    return styled(report, Console(file=io.StringIO(), width=width))


@pytest.mark.parametrize("kind", HOSTILE_REPORTS)
@given(text=hostile_text)
def test_no_name_reaches_the_terminal_as_anything_but_visible_text(kind: str, text: str) -> None:
    out = rendered(HOSTILE_REPORTS[kind](text))
    assert all(character.isprintable() or character == "\n" for character in out)
    out.encode("utf-8")


@pytest.mark.parametrize("kind", HOSTILE_REPORTS)
def test_markup_in_names_is_text(kind: str) -> None:
    assert "[bold]evil[/bold]" in rendered(HOSTILE_REPORTS[kind]("[bold]evil[/bold]"))


def test_plan_says_everything_a_user_decides_by() -> None:
    out = rendered(plan_report(reports.plan(refusals=(REFUSAL,)), COMMAND))
    for said in (
        "base.qcow2", "top.qcow2", "in /disks", "interrupted", "1 GiB to 2 GiB",
        "1 kept (daily)", "1 pruned (daily-stale)", "1 dropped (daily-lost)",
        "1 lost that could have served a backup", "Copies 126 MiB", "needs at most 129 MiB",
        "is deleted", "Other users: ", "as --sole-user says",
        "REFUSED: 7 bytes are missing", "make the volume larger", "explain not-enough-space",
    ):  # fmt: skip
        assert said in out
    assert COMMAND not in out
    feasible = rendered(plan_report(reports.plan(), COMMAND))
    assert f"Finish it: {COMMAND}\n" in feasible
    assert "is renamed" in feasible


def test_a_plan_says_where_other_users_were_looked_for() -> None:
    plan = reports.plan()
    out = rendered(plan_report(replace(plan, searched=replace(plan.searched, sole_user=False)), ""))
    places = "all below /more, their directory, 3 levels below /, but not 1 place: see -v"
    assert f"; searched {places}\n" in out


def test_all_of_a_plan_is_there_with_exact_numbers() -> None:
    out = rendered(plan_details(reports.plan(refusals=(REFUSAL,)), COMMAND))
    for said in (
        "/disks/base.qcow2", "/disks/top.qcow2", "interrupted", "132120576", "1 GiB",
        "commit (chosen)", "keep", "prune", "drop", "1 lost that could have served a backup",
        "tombstone", "135266305", "136314880", "l2 tables", "is deleted", "is renamed",
        "in place of", "not-enough-space", "7 bytes are missing", "make the volume larger",
    ):  # fmt: skip
        assert said in out


def test_a_plan_without_bitmaps_or_refusals_is_shorter() -> None:
    plan = replace(reports.plan(), bitmaps=(), warnings=(), repoint=(), delete=(), rename=None)
    for out in (rendered(plan_report(plan, COMMAND)), rendered(plan_details(plan, COMMAND))):
        for absent in ("REFUSED", "Warnings", "Lost"):
            assert absent not in out


def test_merge_report_tells_a_second_run_from_the_first() -> None:
    report = reports.merge_report(reports.plan())
    assert "top.qcow2 is merged into base.qcow2" in rendered(merge_tables.merge_report(report))
    again = replace(report, outcome=MergeOutcome.ALREADY_MERGED)
    assert "; verified again" in rendered(merge_tables.merge_report(again))
    assert "earlier run" in rendered(merge_tables.merge_report(replace(again, plan=None)))


def test_narrow_terminals_lose_no_letter_of_a_name() -> None:
    name = "".join(chr(ord("a") + i % 26) for i in range(200))
    out = rendered(tables.bitmap_change(reports.bitmap_change(name=name)), width=40)
    assert name in "".join(out.split())


def test_narrow_terminals_leave_room_for_paths() -> None:
    path = "/var/lib/images/" + "x" * 40 + ".qcow2"
    out = rendered(plan_details(reports.plan(base=path), COMMAND), width=80)
    assert f"\n  {path} (oldest)\n" in out
    assert f"◉ {path}.root" in rendered(tables.chain_report(reports.chain_report(image=path)), 80)


def test_a_clean_image_is_said_to_be_so() -> None:
    clean = replace(reports.check_result(), corruptions=0, leaks=0, messages=())
    assert "nothing is wrong" in rendered(tables.check_report(clean))
    assert "1 corruption, 2 leaked clusters" in rendered(
        tables.check_report(reports.check_result())
    )


def test_tombstones_are_explained_where_there_are_some() -> None:
    listing = reports.bitmap_listing()
    assert "A tombstone is" in rendered(tables.bitmap_listing(listing))
    without = replace(listing, rows=listing.rows[:1])
    assert "tombstone" not in rendered(tables.bitmap_listing(without))


def test_a_broken_bitmap_has_qemus_name_too() -> None:
    assert "in-use (inconsistent)" in rendered(tables.bitmap_listing(reports.bitmap_listing()))


def test_status_says_what_finishes_a_merge() -> None:
    report = reports.status_report()
    out = rendered(status_report(report))
    for said in (
        "4 unfinished merges", "/disks/top.qcow2 into /disks/base.qcow2", "still running",
        "chainmerge merge /disks/top.qcow2", "an overlay into", "not known",
        "interrupted at 2023-11-1", "odd; 34 MiB of 150 MiB", "no data is lost",
        "may start from /disks/top.qcow2", "may not start", "chainmerge cancel /disks/top.qcow2",
        "running, pid 4711; 34 MiB of 150 MiB, 12.0 MiB/s", "not possible: odd", "pid 4711 on odd",
    ):  # fmt: skip
        assert said in out
    without = replace(report, merges=())
    assert "no unfinished merges in /disks" in rendered(status_report(without))
