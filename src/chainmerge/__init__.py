# SPDX-License-Identifier: Apache-2.0
"""Merge snapshots of virtual disks: qcow2 backing chains, with their dirty bitmaps.

>>> import chainmerge
>>> plan = chainmerge.plan("/images/disk-snap1.qcow2")          # doctest: +SKIP
>>> report = chainmerge.merge("/images/disk-snap1.qcow2")       # doctest: +SKIP

Every function raises :class:`ChainmergeError` only. Its subclasses, and the types of what functions
return, are imported from here as well. All of it is loaded on first use, so ``import chainmerge``
costs next to nothing.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from chainmerge.__about__ import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chainmerge.api import (
        bitmaps_add,
        bitmaps_clear,
        bitmaps_list,
        bitmaps_list_disks,
        bitmaps_merge,
        bitmaps_remove,
        bitmaps_remove_all,
        bitmaps_repair,
        cancel,
        check_image,
        explain,
        find_backing,
        flatten,
        flatten_disks,
        inspect,
        list_chains,
        measure,
        merge,
        merge_disks,
        plan,
        plan_bitmaps_repair,
        plan_disks,
        plan_flatten,
        plan_flatten_disks,
        plan_repair,
        prune,
        relink,
        repair,
        status,
        undo_repair,
    )
    from chainmerge.documents.bitmaps import (
        BitmapChange,
        BitmapListing,
        BitmapResult,
        BitmapRow,
        BitmapsOfDisks,
        BitmapVerdict,
        PrunedBitmap,
        PruneReport,
    )
    from chainmerge.documents.chains import ChainsReport, ChainSummary
    from chainmerge.documents.disks import (
        DiskError,
        DiskOutcome,
        DiskReport,
        DisksPlan,
        DisksReport,
    )
    from chainmerge.documents.images import (
        BackingCandidate,
        BackingReport,
        ChainReport,
        CheckResult,
        ImageReport,
        ImageUser,
        RelinkReport,
        Searched,
    )
    from chainmerge.documents.merge import (
        Measurement,
        MergeOutcome,
        MergeReport,
    )
    from chainmerge.documents.plan import (
        DirectionCost,
        Directions,
        EngineName,
        Finding,
        LeakFacts,
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
    from chainmerge.documents.progress import (
        OnProgress,
        ProgressEvent,
        ShouldStop,
        Stage,
    )
    from chainmerge.documents.repair import (
        CancelReport,
        RepairFinding,
        RepairReport,
        UndoReport,
    )
    from chainmerge.documents.status import (
        LiveMergeStatus,
        LiveStatusReport,
        MergeProcess,
        StatusReport,
        UnfinishedMerge,
    )
    from chainmerge.errors import (
        ChainmergeError,
        ChainUnusable,
        CheckpointsAtRisk,
        ExitCode,
        Failed,
        ImageInvalid,
        ImageUnavailable,
        Interrupted,
        Misuse,
        NeededByOthers,
        NewerDataAtRisk,
        NoSpace,
        NotVerified,
        OutcomeUnknown,
        RecordsUnusable,
        Refused,
        SnapshotsAtRisk,
        StorageFailed,
        UsedByOthers,
        VmUnavailable,
    )
    from chainmerge.options import (
        Access,
        LiveOptions,
        MergeOptions,
    )

__all__ = [
    "Access",
    "BackingCandidate",
    "BackingReport",
    "BitmapChange",
    "BitmapListing",
    "BitmapResult",
    "BitmapRow",
    "BitmapVerdict",
    "BitmapsOfDisks",
    "CancelReport",
    "ChainReport",
    "ChainSummary",
    "ChainUnusable",
    "ChainmergeError",
    "ChainsReport",
    "CheckResult",
    "CheckpointsAtRisk",
    "DirectionCost",
    "Directions",
    "DiskError",
    "DiskOutcome",
    "DiskReport",
    "DisksPlan",
    "DisksReport",
    "EngineName",
    "ExitCode",
    "Failed",
    "Finding",
    "ImageInvalid",
    "ImageReport",
    "ImageUnavailable",
    "ImageUser",
    "Interrupted",
    "LeakFacts",
    "LiveMergeStatus",
    "LiveOptions",
    "LiveStatusReport",
    "Measurement",
    "MergeOptions",
    "MergeOutcome",
    "MergePlan",
    "MergeProcess",
    "MergeReport",
    "Misuse",
    "Movement",
    "NeededByOthers",
    "NewerDataAtRisk",
    "NoSpace",
    "NotVerified",
    "OnProgress",
    "OutcomeUnknown",
    "PlannedBitmap",
    "PlannedHiding",
    "PlannedImage",
    "PlannedSnapshots",
    "Progress",
    "ProgressEvent",
    "PruneReport",
    "PrunedBitmap",
    "RecordsUnusable",
    "Refused",
    "RelinkReport",
    "RepairFinding",
    "RepairReport",
    "Repoint",
    "Role",
    "Searched",
    "ShouldStop",
    "SnapshotsAtRisk",
    "SpacePlan",
    "Stage",
    "StatusReport",
    "StorageFailed",
    "UndoReport",
    "UnfinishedMerge",
    "UsedByOthers",
    "VmUnavailable",
    "__version__",
    "bitmaps_add",
    "bitmaps_clear",
    "bitmaps_list",
    "bitmaps_list_disks",
    "bitmaps_merge",
    "bitmaps_remove",
    "bitmaps_remove_all",
    "bitmaps_repair",
    "cancel",
    "check_image",
    "explain",
    "find_backing",
    "flatten",
    "flatten_disks",
    "inspect",
    "list_chains",
    "measure",
    "merge",
    "merge_disks",
    "plan",
    "plan_bitmaps_repair",
    "plan_disks",
    "plan_flatten",
    "plan_flatten_disks",
    "plan_repair",
    "prune",
    "relink",
    "repair",
    "status",
    "undo_repair",
]

_ELSEWHERE: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "chainmerge.documents.bitmaps": (
            "BitmapChange",
            "BitmapListing",
            "BitmapsOfDisks",
            "BitmapResult",
            "BitmapRow",
            "BitmapVerdict",
            "PruneReport",
            "PrunedBitmap",
        ),
        "chainmerge.documents.chains": (
            "ChainSummary",
            "ChainsReport",
        ),
        "chainmerge.documents.disks": (
            "DiskError",
            "DiskOutcome",
            "DiskReport",
            "DisksPlan",
            "DisksReport",
        ),
        "chainmerge.documents.images": (
            "BackingCandidate",
            "BackingReport",
            "ChainReport",
            "CheckResult",
            "ImageReport",
            "ImageUser",
            "RelinkReport",
            "Searched",
        ),
        "chainmerge.documents.merge": (
            "Measurement",
            "MergeOutcome",
            "MergeReport",
        ),
        "chainmerge.documents.plan": (
            "DirectionCost",
            "Directions",
            "EngineName",
            "Finding",
            "LeakFacts",
            "MergePlan",
            "Movement",
            "PlannedBitmap",
            "PlannedHiding",
            "PlannedImage",
            "PlannedSnapshots",
            "Progress",
            "Repoint",
            "Role",
            "SpacePlan",
        ),
        "chainmerge.documents.progress": (
            "OnProgress",
            "ProgressEvent",
            "ShouldStop",
            "Stage",
        ),
        "chainmerge.documents.repair": (
            "CancelReport",
            "RepairFinding",
            "RepairReport",
            "UndoReport",
        ),
        "chainmerge.documents.status": (
            "LiveMergeStatus",
            "LiveStatusReport",
            "MergeProcess",
            "StatusReport",
            "UnfinishedMerge",
        ),
        "chainmerge.errors": (
            "ChainUnusable",
            "ChainmergeError",
            "CheckpointsAtRisk",
            "ExitCode",
            "Failed",
            "ImageInvalid",
            "ImageUnavailable",
            "Interrupted",
            "Misuse",
            "NeededByOthers",
            "NewerDataAtRisk",
            "NoSpace",
            "NotVerified",
            "OutcomeUnknown",
            "RecordsUnusable",
            "Refused",
            "SnapshotsAtRisk",
            "StorageFailed",
            "UsedByOthers",
            "VmUnavailable",
        ),
        "chainmerge.options": (
            "Access",
            "LiveOptions",
            "MergeOptions",
        ),
    }
)
"""Names that are not of :mod:`chainmerge.api`, by their modules."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((module for module, names in _ELSEWHERE.items() if name in names), "chainmerge.api")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
