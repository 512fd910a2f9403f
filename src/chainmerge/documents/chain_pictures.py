# SPDX-License-Identifier: Apache-2.0
"""What pictures of a chain are drawn from: its space, its map, its checkpoints, and the plan."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from chainmerge.documents.chains import ChainSummary
from chainmerge.documents.disk_map import DiskMap
from chainmerge.documents.plan import MergePlan
from chainmerge.documents.scan import ScanFinding
from chainmerge.documents.trends import Forecast, TrendPoint

MOST_CHECKPOINTS: Final = 100
"""Checkpoints of a chain that are pictured, at most."""


class LayerSpace(Struct, frozen=True):
    """What an image of a chain holds, in bytes.

    Attributes:
        path: The image's path.
        format: Its format.
        file_size: Size of the file or device.
        occupied_bytes: What it takes of its file system; None for a device, or if unknown.
        visible_bytes: Guest data that whoever reads the chain from its upper end sees.
        hidden_bytes: Guest data that images above hide, or that lies past the end of a shorter
            one: what a merge frees. Both count compressed data as the guest has it.
        metadata_bytes: The header, the tables of the mapping and the refcounts, in whole clusters.
            Those of internal snapshots are left out.
        bitmap_bytes: The stored bitmaps with their tables and their directory, in whole clusters;
            0 if the image does not vouch for them.
    """

    path: str
    format: str
    file_size: int
    occupied_bytes: int | None
    visible_bytes: int
    hidden_bytes: int
    metadata_bytes: int
    bitmap_bytes: int


class CheckpointCell(Struct, frozen=True):
    """A bitmap of a checkpoint's name in one image.

    Attributes:
        layer: Which image, as an index from the root at 0.
        state: ``valid``, ``disabled`` or ``in-use``.
        tombstone: Whether the name only keeps images above from passing the chain test.
        dirty_bytes: Guest bytes marked dirty, None if the content is worthless.
    """

    layer: int
    state: str
    tombstone: bool
    dirty_bytes: int | None


class PicturedCheckpoint(Struct, frozen=True):
    """A checkpoint: in which images it has a bitmap, and what the next backup by it would be.

    Attributes:
        name: The name of its bitmaps.
        usable: Whether it serves a backup that is read from the chain's upper end.
        reason: Why, in words.
        next_backup_bytes: What an incremental backup since then copies: the granules that are dirty
            in any of its bitmaps. None if it cannot be used.
        cells: The images that have it, from the root up.
    """

    name: str
    usable: bool
    reason: str
    next_backup_bytes: int | None
    cells: tuple[CheckpointCell, ...]


class ChainPictures(Struct, frozen=True):
    """All that the pictures of a chain show.

    Attributes:
        version: Version of this document.
        image: The path of its uppermost image.
        layers: The images from the root up.
        map: Who decides what of the disk.
        checkpoints: By name.
        checkpoints_left_out: How many more there are.
        plan: What a merge would do; None if there is nothing to merge, or no plan can be made.
        problem: Why no plan can be made, in a sentence; None if one was made, or none was wanted.
    """

    version: int
    image: str
    layers: tuple[LayerSpace, ...]
    map: DiskMap
    checkpoints: tuple[PicturedCheckpoint, ...]
    checkpoints_left_out: int
    plan: MergePlan | None
    problem: str | None


class ChainsPictures(Struct, frozen=True):
    """The chains of some places: all of them in a line each, and pictures of some.

    Attributes:
        version: Version of this document.
        places: Where was looked, as absolute paths; volume groups by their names.
        made_at: When the scan began, in seconds since 1970 (UTC).
        chains: All chains; those whose merge would free most first, those that cannot be read last.
        findings: What a scan has found that somebody should know, the most severe first.
        pictures: Those of the first of them.
        problems: What could not be pictured, or was not looked at, and why; a sentence each.
        trends: What scans of these places have found until now, in the order of time.
        forecasts: As in :class:`chainmerge.documents.scan.ScanReport`.
    """

    version: int
    places: tuple[str, ...]
    made_at: int
    chains: tuple[ChainSummary, ...]
    findings: tuple[ScanFinding, ...]
    pictures: tuple[ChainPictures, ...]
    problems: tuple[str, ...]
    trends: tuple[TrendPoint, ...] = ()
    forecasts: tuple[Forecast, ...] = ()
