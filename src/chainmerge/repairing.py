# SPDX-License-Identifier: Apache-2.0
"""Mends what others, or a kill, left behind in one image: broken bitmaps, leaked clusters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from chainmerge.chain import ImageInfo, Relatives, discover, find_relatives
from chainmerge.checkpoints import BitmapState
from chainmerge.engines.metadata import StoredBitmap, reclaim_leaks, replace_bitmaps
from chainmerge.inspection import (
    OpenImage,
    bitmaps_of,
    names_above,
    open_chain,
    policy_of,
)
from chainmerge.journal import load_saved_bitmaps, saved_bitmaps_file
from chainmerge.options import Access
from chainmerge.qcow2.check import CheckReport, check
from chainmerge.storage.files import WritablePort
from chainmerge.storage.locks import LockMode, lock_image
from chainmerge.tombstones import tombstone
from chainmerge.types import REPORT_VERSION, CheckResult, RepairFinding, RepairReport


def check_image(image: str | Path, access: Access | None = None) -> CheckResult:
    """Recompute an image's refcounts and compare them with the stored ones; writes nothing.

    Raises:
        Refused: the image cannot be read, or has no refcounts.
    """
    access = access or Access()
    chain = discover(Path(image), policy_of(access))
    with open_chain(chain) as opened:
        top = opened.images[-1]
        if top.image is None:
            return CheckResult(REPORT_VERSION, str(image), 0, 0, (), top.info.file_size)
        report = check(top.image)
    return CheckResult(
        version=REPORT_VERSION,
        image=str(image),
        corruptions=report.corruptions + report.overlaps,
        leaks=report.leaks,
        messages=report.messages,
        image_end_offset=report.image_end_offset,
    )


def repair(
    image: str | Path, access: Access | None = None, *, dry_run: bool = False
) -> RepairReport:
    """Remove broken bitmaps from an image, and reclaim its leaked clusters.

    Bitmaps that an interrupted merge has saved are left alone: running the merge again
    brings them back.

    Args:
        image: the image to mend.
        access: how images may be found and reached.
        dry_run: only say what would be done.

    Raises:
        Refused: nothing was changed; an image with corruptions is none of ours to mend.
    """
    access = access or Access()
    with lock_image(image, LockMode.WRITER, access.lock_wait):
        chain = discover(Path(image), policy_of(access))
        relatives = find_relatives(
            chain,
            len(chain.images) - 1,
            tuple(map(Path, access.search)),
            Path(access.active) if access.active else None,
            policy=policy_of(access),
        )
        with open_chain(chain) as opened:
            wrong = _examine(opened.images[-1], relatives)
        if not dry_run and wrong.actions:
            _mend(wrong)
    return RepairReport(
        version=REPORT_VERSION,
        image=str(image),
        dry_run=dry_run,
        findings=wrong.findings,
        actions=wrong.actions,
        consequences=wrong.consequences,
    )


@dataclass(frozen=True, slots=True)
class _Wrong:
    """What is wrong with an image, and what is to be stored in its place."""

    info: ImageInfo
    findings: tuple[RepairFinding, ...]
    actions: tuple[str, ...]
    consequences: tuple[str, ...]
    sound_bitmaps: tuple[StoredBitmap, ...] | None
    leaks: bool


def _examine(opened: OpenImage, relatives: Relatives) -> _Wrong:
    info, image = opened.info, opened.image
    if image is None:
        return _Wrong(info, (), (), (), None, leaks=False)
    findings: list[RepairFinding] = []
    actions: list[str] = []
    consequences: list[str] = []
    broken = _broken_bitmaps(opened)
    if _is_merge_pending(info):
        findings.append(
            RepairFinding(
                "interrupted-merge",
                f"a merge into {info.path} was interrupted; its bitmaps are saved in "
                f"{saved_bitmaps_file(info.real_path)}: run the same merge again",
                repairable=False,
            )
        )
        broken = ()
    guarded = names_above(relatives)
    for name in broken:
        findings.append(
            RepairFinding("broken-bitmap", f"bitmap {name!r} is in-use", repairable=True)
        )
        actions.append(
            f"replace the bitmap {name!r} by a tombstone, because an image above has the name"
            if name in guarded
            else f"remove the bitmap {name!r}"
        )
        consequences.append(
            f"the next backup that builds on the checkpoint {name!r} must be a full one"
        )
    report = check(image)
    findings.extend(_check_findings(report))
    if report.leaks and report.sound:
        actions.append(f"reclaim {report.leaks} leaked clusters")
    return _Wrong(
        info=info,
        findings=tuple(findings),
        actions=tuple(actions),
        consequences=tuple(consequences),
        sound_bitmaps=_sound_bitmaps(opened, broken, guarded) if broken else None,
        leaks=bool(report.leaks),
    )


def _broken_bitmaps(opened: OpenImage) -> tuple[str, ...]:
    layer = bitmaps_of(opened)
    return tuple(
        sorted(name for name in layer.occurrences if layer.state(name) is BitmapState.IN_USE)
    )


def _sound_bitmaps(
    opened: OpenImage, broken: tuple[str, ...], guarded: frozenset[str]
) -> tuple[StoredBitmap, ...]:
    """What stands in the image once the broken bitmaps are out of it.

    Without a tombstone, an image above that has the name too could pass the chain test with
    its own bits alone.
    """
    size = opened.info.virtual_size
    return tuple(
        tombstone(entry.name, size, entry.granularity)
        if entry.name in broken
        else StoredBitmap(entry.name, opened.bits(entry.name), entry.flags)
        for entry in opened.info.bitmaps
        if entry.name not in broken or entry.name in guarded
    )


def _is_merge_pending(info: ImageInfo) -> bool:
    return load_saved_bitmaps(info.real_path) is not None


def _check_findings(report: CheckReport) -> list[RepairFinding]:
    findings = []
    if report.leaks:
        findings.append(
            RepairFinding(
                "leaked-clusters",
                f"{report.leaks} clusters are marked used, and nothing uses them",
                repairable=report.sound,
            )
        )
    if not report.sound:
        findings.extend(
            RepairFinding("corruption", message, repairable=False) for message in report.messages
        )
    return findings


def _mend(wrong: _Wrong) -> None:
    with WritablePort(wrong.info.real_path) as port:
        if wrong.sound_bitmaps is not None:
            replace_bitmaps(port, wrong.sound_bitmaps)
        reclaim_leaks(port)
