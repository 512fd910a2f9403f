# SPDX-License-Identifier: Apache-2.0
"""What plans and reports look like on a terminal: short, the answer first, nothing too wide."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Final

import pytest
from msgspec.structs import replace
from rich.console import Console

from chainmerge.documents.disk_map import DiskMap, MapColumn
from chainmerge.documents.disks import DiskOutcome, DiskReport, DisksPlan, DisksReport
from chainmerge.documents.images import Searched
from chainmerge.documents.plan import (
    EngineName,
    Finding,
    MergePlan,
    Prediction,
    Progress,
    Repoint,
    Role,
)
from chainmerge.report.merge_tables import disks_report, live_merge_report, merge_report
from chainmerge.report.plan_tables import disks_plan_report, plan_report
from chainmerge.report.styled import styled
from tests.support import reports
from tests.support.reports import MIB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainmerge.documents.merge import MergeReport
    from chainmerge.report.layout import Block

IMAGES: Final = "/var/lib/libvirt/images"
COMMAND: Final = "chainmerge merge --delete snap1.qcow2"
REFUSAL: Final = Finding("not-enough-space", "7 bytes are missing", "make the volume larger")
WIDTHS: Final = pytest.mark.parametrize("width", [80, 60])


def plan_of(
    names: Sequence[str], top: int, base: int = 0, *, refusals: tuple[Finding, ...] = ()
) -> MergePlan:
    """A plan for a chain, oldest image first; *top* and *base* are indices of it."""
    usual = reports.plan()
    paths = [f"{IMAGES}/{name}.qcow2" for name in names]
    images = tuple(
        replace(
            usual.images[0],
            path=path,
            role=_role(at, top, base),
            parent=paths[at - 1] if at else None,
            notes=(),
        )
        for at, path in enumerate(paths)
    )
    children = [Repoint(path, paths[top], f"{names[base]}.qcow2", "qcow2") for path in paths]
    return replace(
        usual,
        base=paths[base],
        top=paths[top],
        images=images,
        progress=Progress.NEW,
        engine=EngineName.NATIVE,
        bitmaps=usual.bitmaps[:2],
        snapshots=(),
        virtual_size_after=usual.virtual_size_before,
        space=replace(
            usual.space,
            kind="file",
            allocates=6 * MIB,
            limit=1024 * MIB,
            prune_first=False,
            shrink_to=None,
        ),
        hides=None,
        repoint=tuple(children[top + 1 : top + 2]),
        delete=tuple(reversed(paths[base + 1 : top + 1])),
        rename=None,
        other_users=tuple(paths[top + 1 : top + 2]),
        searched=Searched((IMAGES,), (), (IMAGES,)),
        refusals=refusals,
        warnings=(),
        freed_bytes=12 * MIB,
        deletable_bytes=12 * MIB,
    )


def _role(at: int, top: int, base: int) -> Role:
    if at in (top, base):
        return Role.TOP if at == top else Role.BASE
    if base < at < top:
        return Role.MIDDLE
    return Role.ABOVE if at > top else Role.BELOW


FOUR: Final = plan_of(("base", "snap1", "snap2", "active"), 1)
MAP: Final = DiskMap(
    48,
    1,
    tuple(image.path for image in FOUR.images),
    tuple(MapColumn(column % 4 if column else None, 1, 1, 0) for column in range(48)),
)
FORTY: Final = plan_of([f"snap{number}" for number in range(39)] + ["active"], 39)
FORTY_IN_THE_MIDDLE: Final = plan_of([f"snap{number}" for number in range(40)], 25, 15)
DISKS: Final = tuple(plan_of((f"disk{n}", f"disk{n}-snap"), 1) for n in range(3))
THREE: Final = DisksPlan(1, DISKS, ())
REFUSED: Final = replace(THREE, disks=(*DISKS[:2], replace(DISKS[2], refusals=(REFUSAL,))))


def merged(plan: MergePlan) -> MergeReport:
    """What the merge of a plan did."""
    report = reports.merge_report(plan)
    return replace(
        report,
        repointed=tuple(one.child for one in plan.repoint),
        deleted=plan.delete,
        renamed=None,
        warnings=(),
        copy_seconds=0.25,
    )


def screen(block: Block, width: int) -> list[str]:
    """The lines that a terminal shows, where what is to be copied goes on to the next one."""
    console = Console(file=io.StringIO(), width=width)
    return [
        line[at : at + width]
        for line in styled(block, console).splitlines()
        for at in range(0, max(len(line), 1), width)
    ]


@WIDTHS
@pytest.mark.parametrize(
    ("block", "most"),
    [
        pytest.param(plan_report(FOUR, COMMAND), 18, id="four images"),
        pytest.param(plan_report(plan_of("abcd", 3), COMMAND), 18, id="four images, all merged"),
        pytest.param(
            plan_report(replace(FOUR, refusals=(REFUSAL,)), COMMAND), 18, id="four images, refused"
        ),
        pytest.param(plan_report(FORTY, COMMAND, MAP), 25, id="forty images"),
        pytest.param(plan_report(FORTY_IN_THE_MIDDLE, COMMAND), 25, id="forty images, some merged"),
        pytest.param(disks_plan_report(THREE, COMMAND), 25, id="three disks"),
        pytest.param(disks_plan_report(REFUSED, COMMAND), 25, id="three disks, refused"),
        pytest.param(merge_report(merged(FOUR)), 12, id="merged"),
        pytest.param(
            merge_report(merged(replace(FORTY, delete=()))), 12, id="forty images merged, and kept"
        ),
    ],
)
def test_it_fits_on_a_screen(block: Block, most: int, width: int) -> None:
    lines = screen(block, width)
    assert len(lines) <= most, "\n".join(lines)


@WIDTHS
@pytest.mark.parametrize("refusals", [(), (REFUSAL,)], ids=["feasible", "refused"])
def test_the_answer_comes_first(refusals: tuple[Finding, ...], width: int) -> None:
    lines = screen(plan_report(replace(FOUR, refusals=refusals), COMMAND), width)
    answer = [line for line in lines[: lines.index("")] if line]
    assert answer[0].startswith("Merge snap1.qcow2 into base.qcow2")
    at = next(n for n, line in enumerate(answer) if line.startswith(("REFUSED", "Do it")))
    assert at <= {80: 6, 60: 7}[width], "\n".join(answer)
    said = "\n".join(answer)
    for words in ("snapshot", "Copies 126 MiB", "needs 6 MiB", "896 MiB free", "Frees 12 MiB"):
        assert words in said
    assert ("REFUSED: 7 bytes are missing" in said) == bool(refusals)
    assert (COMMAND in said) != bool(refusals)


@WIDTHS
@pytest.mark.parametrize("plan", [FOUR, replace(FOUR, refusals=(REFUSAL,))])
def test_a_map_takes_two_lines(plan: MergePlan, width: int) -> None:
    without = screen(plan_report(plan, COMMAND), width)
    drawn = screen(plan_report(plan, COMMAND, MAP), width)
    assert len(drawn) == len(without) + 2
    assert len(drawn) <= 18 or width < 80


def test_the_five_lines_of_an_answer() -> None:
    lines = screen(plan_report(FOUR, COMMAND), 4000)
    assert lines[:7] == [
        f"Merge snap1.qcow2 into base.qcow2, in {IMAGES}",
        "Gone then: the snapshot taken when snap1.qcow2 was created",
        "Copies 126 MiB; needs 6 MiB while merging, 896 MiB free",
        "Frees 12 MiB: snap1.qcow2 is deleted",
        "Other users: none found; searched 3 levels below their directory",
        f"Do it: {COMMAND}",
        "",
    ]


def test_the_leaf_is_first_and_the_ends_are_named() -> None:
    lines = screen(plan_report(FOUR, COMMAND), 80)
    chain = [line.split("  ")[1] for line in lines if ".qcow2" in line and line.startswith("  ")]
    assert chain == ["active.qcow2 (active)", "snap2.qcow2", "snap1.qcow2", "base.qcow2 (oldest)"]


def test_the_middle_of_a_long_chain_is_counted() -> None:
    lines = screen(plan_report(FORTY, COMMAND), 80)
    at = next(n for n, line in enumerate(lines) if line.startswith("  ... 38 images ..."))
    assert "active.qcow2 (active)" in lines[at - 1]
    assert "snap0.qcow2 (oldest)" in lines[at + 1]


def test_shared_data_is_not_called_copied() -> None:
    shared = replace(FOUR, shared_bytes=126 * MIB)
    assert "Shares 126 MiB, copies nothing; " in screen(plan_report(shared, COMMAND), 80)[2]
    line = screen(merge_report(merged(shared)), 80)[1]
    assert line == "126 MiB shared; 1 check passed; 0.5 s in all"
    partly = replace(FOUR, shared_bytes=100 * MIB)
    assert "Shares 100 MiB, copies 26 MiB; " in screen(plan_report(partly, COMMAND), 80)[2]
    copied = "100 MiB shared, 26 MiB copied (104.0 MiB/s); 1 check passed; 0.5 s in all"
    assert screen(merge_report(merged(partly)), 80)[1] == copied


def test_the_rate_of_a_copy_is_that_of_the_copy() -> None:
    line = screen(merge_report(merged(FOUR)), 80)[1]
    assert line == "126 MiB copied (504.0 MiB/s); 1 check passed; 0.5 s in all"


def test_a_refusal_says_that_no_disk_was_changed() -> None:
    lines = screen(disks_plan_report(REFUSED, COMMAND), 80)
    assert "REFUSED: none of the disks was changed" in lines[:5]
    assert "  disk2-snap.qcow2: 7 bytes are missing" in lines
    verdicts = [line.split()[-1] for line in lines if line.startswith("disk") and "MiB" in line]
    assert verdicts == ["merge", "merge", "REFUSED"]
    (total,) = (line for line in lines if line.startswith("total"))
    assert total.split() == ["total", "378", "MiB", "18", "MiB", "36", "MiB"]


LEAF_KEPT: Final = replace(plan_of(("base", "mid", "top"), 2), delete=())


def test_a_report_says_what_must_not_be_booted_and_what_the_vm_uses_now() -> None:
    lines = screen(merge_report(merged(LEAF_KEPT)), 80)
    assert "Left there, never boot from them (wrong data): mid.qcow2" in lines
    assert "Left there, not to be booted once base changes: top.qcow2" in lines
    assert lines[-3:] == [
        "The VM's configuration must now name:",
        f"  {IMAGES}/base.qcow2 (qcow2)",
        "  libvirt: virsh edit DOMAIN",
    ]


def test_a_vm_that_runs_reads_the_result_already() -> None:
    assert "configuration" not in "\n".join(screen(live_merge_report(merged(LEAF_KEPT)), 80))


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(FOUR, id="the active image stays"),
        pytest.param(
            replace(LEAF_KEPT, directions=replace(LEAF_KEPT.directions, chosen="pull"), repoint=()),
            id="the active image has the result",
        ),
    ],
)
def test_nothing_is_to_be_configured_where_the_leaf_stays(plan: MergePlan) -> None:
    assert "configuration" not in "\n".join(screen(merge_report(merged(plan)), 80))


def test_a_result_with_the_name_of_the_leaf_needs_no_configuration() -> None:
    report = replace(merged(LEAF_KEPT), renamed=(LEAF_KEPT.base, LEAF_KEPT.top))
    assert "configuration" not in "\n".join(screen(merge_report(report), 80))


def test_a_disk_of_proxmox_is_told_with_its_command() -> None:
    base = "/var/lib/vz/images/100/base.qcow2"
    top = "/var/lib/vz/images/100/top.qcow2"
    low, high = LEAF_KEPT.images[0], LEAF_KEPT.images[-1]
    images = (replace(low, path=base), replace(high, path=top, parent=base))
    lines = screen(merge_report(merged(replace(LEAF_KEPT, base=base, top=top, images=images))), 80)
    assert lines[-1] == "  qm set 100 --DISK STORAGE:100/base.qcow2"


@WIDTHS
def test_several_disks_have_one_table(width: int) -> None:
    disks = tuple(
        DiskReport(plan.top, plan.base, DiskOutcome.MERGED, merged(plan)) for plan in DISKS
    )
    lines = screen(disks_report(DisksReport(1, disks)), width)
    assert len(lines) <= 12, "\n".join(lines)
    assert lines[0].startswith("3 of 3 disks merged")
    assert sum("The VM's configuration must now name" in line for line in lines) == 1


def _foretold(plan: MergePlan, *seconds: float) -> MergePlan:
    known = dict(zip(("seconds", "at_least", "at_most"), seconds, strict=False))
    return replace(plan, prediction=Prediction("ext4 UUID=1", 4 if seconds else 3, **known))


@WIDTHS
@pytest.mark.parametrize(
    ("plan", "line"),
    [
        (_foretold(FOUR), "Time: no data yet (3 merges like this on this storage)"),
        (
            _foretold(FOUR, 95.2, 8.04, 7500.0),
            "Time: about 95 s (8.0 s to 2 h), by 4 merges on this storage",
        ),
        (replace(FOUR, prediction=Prediction("x", 0)), "Time: no data yet"),
    ],
)
def test_the_time_is_a_line_of_the_answer(plan: MergePlan, line: str, width: int) -> None:
    lines = screen(plan_report(plan, COMMAND), width)
    assert line in " ".join(lines)
    added = len(lines) - len(screen(plan_report(FOUR, COMMAND), width))
    assert added == (1 if len(line) <= width else 2)
    refused = screen(plan_report(replace(plan, refusals=(REFUSAL,)), COMMAND), width)
    assert not [one for one in refused if one.startswith("Time")]
