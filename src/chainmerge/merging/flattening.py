# SPDX-License-Identifier: Apache-2.0
"""Makes images independent: everything below is pulled up, and the name stays the same."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from chainmerge.chain.discovery import discover
from chainmerge.chain.model import ImageFormat
from chainmerge.chain.target import policy_of
from chainmerge.documents.disks import DiskOutcome, DiskReport, DisksPlan, DisksReport
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.merging.disks import merge_disks, plan_disks
from chainmerge.merging.merge import merge
from chainmerge.merging.reporting import build_report
from chainmerge.options import Access, MergeOptions
from chainmerge.planning.dry_run import plan
from chainmerge.records.merged_record import load_merged_record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainmerge.documents.merge import MergeReport
    from chainmerge.documents.plan import MergePlan
    from chainmerge.documents.progress import OnProgress, ShouldStop


def plan_flatten(
    top: str | Path, access: Access | None = None, options: MergeOptions | None = None
) -> MergePlan:
    """Say what :func:`flatten` would do. Nothing is written and nothing stays locked.

    Raises:
        NoBackingFile: *top* stands alone.
        ChainmergeError: the chain cannot be found or read.
    """
    access = access or Access()
    return plan(top, _lowest(Path(top), access), access, _pulling(options))


def plan_flatten_disks(
    tops: Sequence[str | Path], access: Access | None = None, options: MergeOptions | None = None
) -> DisksPlan:
    """As :func:`plan_flatten`, for the disks of one virtual machine, but those that stand alone.

    Raises what :func:`chainmerge.plan_disks` raises.
    """
    access = access or Access()
    bases = {str(top): base for top in tops if (base := _lowest(Path(top), access)) is not None}
    return plan_disks(tuple(bases), tuple(bases.values()), access, _pulling(options))


def flatten(
    top: str | Path,
    access: Access | None = None,
    options: MergeOptions | None = None,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop | None = None,
) -> MergeReport:
    """Pull everything that *top* lacks up from the images below, so that it stands alone.

    The images below stay as they are, unless ``options.delete`` is set. A run that was
    interrupted is finished by the same call; an image that stands alone is left as it is.

    Args:
        top: the image, in qcow2.
        access: how images may be found and reached.
        options: how to merge; the direction is always ``pull``.
        on_progress: called as the work goes on.
        should_stop: asked as the work goes on.

    Raises what :func:`chainmerge.merge` raises.
    """
    access, started = access or Access(), time.monotonic()
    base = _lowest(Path(top), access)
    if base is None:
        return _standing_alone(Path(top), started)
    return merge(top, base, access, _pulling(options), on_progress, should_stop)


def flatten_disks(
    tops: Sequence[str | Path],
    access: Access | None = None,
    options: MergeOptions | None = None,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop | None = None,
) -> DisksReport:
    """As :func:`flatten`, for several disks: all are planned before the first is written to.

    Raises what :func:`chainmerge.merge_disks` raises.
    """
    access, started = access or Access(), time.monotonic()
    lowest = {str(top): _lowest(Path(top), access) for top in tops}
    bases = {top: base for top, base in lowest.items() if base is not None}
    merged: dict[str, DiskReport] = {}
    if bases:
        options = _pulling(options)
        report = merge_disks(
            tuple(bases), tuple(bases.values()), access, options, on_progress, should_stop
        )
        merged = {disk.top: disk for disk in report.disks}
    alone = {
        top: DiskReport(top, top, DiskOutcome.ALREADY_MERGED, _standing_alone(Path(top), started))
        for top in lowest.keys() - bases.keys()
    }
    return DisksReport(REPORT_VERSION, tuple((merged | alone)[top] for top in lowest))


def _pulling(options: MergeOptions | None) -> MergeOptions:
    return replace(options or MergeOptions(), direction="pull")


def _lowest(top: Path, access: Access) -> Path | None:
    """The root of *top*'s chain; where an earlier run has pulled it up, what that recorded.

    None if *top* stands alone.
    """
    chain = discover(top, policy_of(access))
    if len(chain.images) > 1:
        return chain.root.path
    # Before there is a merge to prepare: only this tells from which base.
    record = load_merged_record(top)
    return Path(record.base) if record is not None and record.pulled is not None else None


def _standing_alone(top: Path, started: float) -> MergeReport:
    verified = (f"{top} has no backing file: it is already independent",)
    return build_report(top, ImageFormat.QCOW2, started, verified=verified)
