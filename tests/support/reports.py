# SPDX-License-Identifier: Apache-2.0
"""Reports as the API returns them, with names that a test chooses."""

from __future__ import annotations

from msgspec.structs import replace

from chainmerge.documents.bitmaps import (
    BitmapChange,
    BitmapListing,
    BitmapResult,
    BitmapRow,
    BitmapVerdict,
    PrunedBitmap,
    PruneReport,
)
from chainmerge.documents.chains import ChainsReport, ChainSummary
from chainmerge.documents.disks import DiskError, DiskOutcome, DiskReport, DisksPlan, DisksReport
from chainmerge.documents.images import ChainReport, CheckResult, ImageReport, Searched
from chainmerge.documents.merge import Measurement, MergeOutcome, MergeReport
from chainmerge.documents.plan import (
    DirectionCost,
    Directions,
    EngineName,
    Finding,
    MergePlan,
    Movement,
    PlannedBitmap,
    PlannedHiding,
    PlannedImage,
    PlannedSnapshots,
    Progress,
    Repoint,
    Role,
    SpacePlan,
)
from chainmerge.documents.repair import RepairFinding, RepairReport, UndoReport
from chainmerge.documents.scan import (
    ScanFinding,
    ScannedBitmap,
    ScannedImage,
    ScanReport,
    Severity,
)
from chainmerge.documents.status import MergeProcess, StatusReport, UnfinishedMerge
from chainmerge.documents.trends import Forecast, Limited
from chainmerge.documents.versions import REPORT_VERSION, STATUS_VERSION
from chainmerge.options import Placement

MIB = 1 << 20


def plan(
    *,
    name: str = "daily",
    base: str = "/disks/base.qcow2",
    top: str = "/disks/top.qcow2",
    words: str = "because the rules say so",
    refusals: tuple[Finding, ...] = (),
) -> MergePlan:
    """A plan in which every part is there; *words* stand wherever a sentence does."""
    return MergePlan(
        version=1,
        base=base,
        top=top,
        progress=Progress.INTERRUPTED,
        images=(
            _image(base, Role.BASE, None, words),
            _image(top, Role.TOP, base, words),
        ),
        engine=EngineName.QEMU,
        engine_reason=words,
        movement=Movement(126 * MIB, 5 * MIB, 0, 2016, 1),
        directions=Directions(
            commit=DirectionCost(126 * MIB, True, words),
            pull=DirectionCost(0, False, words),
            chosen="commit",
        ),
        virtual_size_before=1024 * MIB,
        virtual_size_after=2048 * MIB,
        bitmaps=(
            _bitmap(name, "keep", words, was_valid=True),
            _bitmap(f"{name}-stale", "prune", words, was_valid=False),
            _bitmap(f"{name}-lost", "drop", words, was_valid=True),
        ),
        snapshots=(
            PlannedSnapshots(base, (f"{name}-kept",), (), (), 0),
            PlannedSnapshots(top, (), (f"{name}-lost",), (f"{name}-dropped",), 5 * MIB),
        ),
        space=SpacePlan(
            kind="block",
            size=128 * MIB,
            image_end=3 * MIB,
            required=129 * MIB + 1,
            limit=130 * MIB,
            grow_to=130 * MIB,
            missing=0,
            allocates=None,
            breakdown={"data": 126 * MIB, "l2_tables": 65536},
            shrink_to=127 * MIB,
            placement=Placement.COW,
            required_by_placement={"cow": 129 * MIB + 1, "in-place": 129 * MIB + 1},
            prune_first=True,
        ),
        hides=PlannedHiding(top, 1024 * MIB, 2048 * MIB, 2 * MIB),
        repoint=(Repoint(f"{top}.child", top, base, "qcow2"),),
        delete=(top,),
        rename=(base, top),
        verify="full",
        other_users=(f"{top}.child",),
        searched=_searched(words),
        refusals=refusals,
        warnings=(words,),
    )


def _searched(words: str) -> Searched:
    return Searched(("/disks",), ("/more",), ("/",), (words,), "/disks/leaf.qcow2", sole_user=True)


def merge_report(of: MergePlan, *, name: str = "daily", words: str = "checked") -> MergeReport:
    return MergeReport(
        version=REPORT_VERSION,
        outcome=MergeOutcome.MERGED,
        plan=of,
        bitmaps=(BitmapResult(name, "valid", 65536, 126 * MIB),),
        bytes_copied=126 * MIB,
        seconds=0.5,
        image_end=127 * MIB,
        volume_size=130 * MIB,
        verified=(words,),
        repointed=(f"{of.top}.child",),
        deleted=(of.top,),
        renamed=(of.base, of.top),
        warnings=(words,),
    )


def chain_report(*, image: str = "/disks/top.qcow2", words: str = "odd") -> ChainReport:
    def one(path: str, parent: str | None, *, in_chain: bool) -> ImageReport:
        return ImageReport(
            path=path,
            format="qcow2",
            format_declared=in_chain,
            in_chain=in_chain,
            parent=parent,
            virtual_size=1024 * MIB,
            file_size=5 * MIB,
            allocated_bytes=None,
            cluster_size=65536,
            details={"compression": words},
            bitmaps=2,
            snapshots=0,
            notes=(words,),
        )

    root = f"{image}.root"
    return ChainReport(
        REPORT_VERSION,
        image,
        (
            one(root, None, in_chain=True),
            one(image, root, in_chain=True),
            one(f"{image}.sibling", root, in_chain=False),
        ),
        (words,),
        _searched(words),
    )


def chains_report(*, directory: str = "/disks", words: str = "odd") -> ChainsReport:
    def one(freed: int | None) -> ChainSummary:
        return ChainSummary(
            leaf=f"{directory}/{words}",
            images=3,
            virtual_size=1024 * MIB,
            occupied_bytes=12 * MIB,
            base=f"{directory}/{words}.base",
            freed_bytes=freed,
            bytes_to_copy=3 * MIB,
            unfinished=freed is None,
            users=None if freed is None else (),
            problem=words if freed is None else None,
        )

    return ChainsReport(REPORT_VERSION, directory, (one(5 * MIB), one(None)), 24 * MIB, 5 * MIB)


def scan_report(*, directory: str = "/disks", words: str = "odd") -> ScanReport:
    image = ScannedImage(
        path=f"{directory}/{words}",
        format="qcow2",
        virtual_size=1024 * MIB,
        file_size=12 * MIB,
        occupied_bytes=12 * MIB,
        written_at=7,
        backing=words,
        parent=None,
        children=1,
        depth=None,
        bitmaps=(ScannedBitmap(words, "valid", 65536, 65536, tombstone=False),),
        snapshots=0,
        users=None,
        may_be_stale=False,
        problem=words,
    )
    findings = tuple(
        ScanFinding(words, severity, image.path, words, {words: 7}, f"chainmerge info {words}")
        for severity in reversed(Severity)
    )
    chains = chains_report(directory=directory, words=words).chains
    return ScanReport(
        version=REPORT_VERSION,
        scanned_at=7,
        places=(directory,),
        images=(image,),
        chains=chains,
        findings=findings,
        occupied_bytes=12 * MIB,
        freed_bytes=5 * MIB,
        left_out=(words,),
        forecasts=tuple(
            Forecast(kind, f"{directory}/{words}", image.path, 5, 9, 86_400, 4) for kind in Limited
        ),
        scope=(directory,),
    )


def check_result(*, image: str = "/disks/top.qcow2", words: str = "odd") -> CheckResult:
    return CheckResult(REPORT_VERSION, image, 1, 2, (words,), 5 * MIB)


def measurement(*, base: str = "/disks/base.qcow2", top: str = "/disks/top.qcow2") -> Measurement:
    return Measurement(
        REPORT_VERSION, base, top, 5 * MIB, 4 * MIB, 3 * MIB, 3 * MIB, {"data": 2 * MIB}
    )


def bitmap_listing(
    *, image: str = "/disks/top.qcow2", name: str = "daily", words: str = "valid in 1 image"
) -> BitmapListing:
    return BitmapListing(
        REPORT_VERSION,
        image,
        (
            BitmapRow(image, name, "valid", 65536, 5 * MIB, tombstone=False),
            BitmapRow(f"{image}.base", name, "disabled", 65536, 0, tombstone=True),
            BitmapRow(f"{image}.base", f"{name}-broken", "in-use", 65536, None, tombstone=False),
        ),
        (BitmapVerdict(name, passes=False, reason=words),),
    )


def bitmap_change(*, image: str = "/disks/top.qcow2", name: str = "daily") -> BitmapChange:
    result = BitmapResult(name, "valid", 65536, 0)
    return BitmapChange(REPORT_VERSION, image, "add", (name,), (result,))


def prune_report(
    *, image: str = "/disks/base.qcow2", name: str = "stale", words: str = "not in top"
) -> PruneReport:
    return PruneReport(
        REPORT_VERSION,
        image,
        image,
        (PrunedBitmap(image, name, "valid", tombstone=True, reason=words),),
        (f"{name}-kept",),
        (name,),
    )


def repair_report(*, image: str = "/disks/base.qcow2", words: str = "is broken") -> RepairReport:
    return RepairReport(
        REPORT_VERSION,
        image,
        dry_run=True,
        findings=(RepairFinding("broken-bitmap", words, repairable=True),),
        actions=(words,),
        consequences=(words,),
        backup=f"{image}.chainmerge-repair-1",
        verified=(words,),
        warnings=(words,),
    )


def undo_report(*, image: str = "/disks/base.qcow2") -> UndoReport:
    return UndoReport(REPORT_VERSION, image, f"{image}.chainmerge-repair-1", 3 * MIB)


def _image(path: str, role: Role, parent: str | None, words: str) -> PlannedImage:
    return PlannedImage(
        path=path,
        role=role,
        format="qcow2",
        format_declared=True,
        virtual_size=1024 * MIB,
        file_size=3 * MIB,
        cluster_size=65536,
        bitmaps=2,
        parent=parent,
        notes=(words,),
    )


def _bitmap(name: str, fate: str, words: str, *, was_valid: bool) -> PlannedBitmap:
    return PlannedBitmap(
        name=name,
        fate=fate,
        rule="a-rule",
        reason=words,
        tombstone=fate == "drop",
        granularity=65536,
        dirty_bytes=None if fate == "drop" else 5 * MIB,
        was_valid=was_valid,
        unguarded=False,
        states={"/disks/base.qcow2": "valid"},
        recovered=False,
    )


def status_report(
    *, base: str = "/disks/base.qcow2", top: str = "/disks/top.qcow2", words: str = "odd"
) -> StatusReport:
    known = UnfinishedMerge(
        base=base,
        top=top,
        state="repoint",
        progress=words,
        base_holds_data=True,
        base_is_locked=True,
        command=f"chainmerge merge {top}",
        files=(f"{base}.journal",),
        warnings=(words,),
        vm_image=top,
        vm_reason=words,
        cancel_reason=words,
        process=MergeProcess(4711, words, words, running=False),
    )
    idle = replace(
        known,
        base_is_locked=False,
        vm_may_start=True,
        cancel_command=f"chainmerge cancel {top}",
        cancel_reason="",
        bytes_done=34 << 20,
        bytes_total=150 << 20,
        rate=12 << 20,
        noted_at=1_700_000_000,
    )
    assert known.process is not None
    running = replace(idle, base_is_locked=True, process=replace(known.process, running=True))
    unknown = replace(known, top=None, state="unknown", base_holds_data=None, command=None)
    unknown = replace(unknown, vm_image=None)
    return StatusReport(STATUS_VERSION, ("/disks",), (known, idle, running, unknown))


def disks_report(*, top: str = "/disks/top.qcow2", words: str = "odd") -> DisksReport:
    done = DiskReport(top, top, DiskOutcome.MERGED, merge_report(plan(top=top, words=words)))
    failed = DiskReport(top, top, DiskOutcome.FAILED, None, DiskError(words, words, words))
    waiting = DiskReport(top, top, DiskOutcome.NOT_BEGUN)
    return DisksReport(REPORT_VERSION, (done, failed, waiting))


def disks_plan(
    *, name: str, base: str, top: str, words: str, refusals: tuple[Finding, ...] = ()
) -> DisksPlan:
    disk = plan(name=name, base=base, top=top, words=words)
    return DisksPlan(REPORT_VERSION, (disk, plan()), refusals)
