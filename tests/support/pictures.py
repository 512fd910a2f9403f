# SPDX-License-Identifier: Apache-2.0
"""Pictures of chains as the API returns them, with names and lengths that a test chooses."""

from __future__ import annotations

from chainmerge.documents.chain_pictures import (
    ChainPictures,
    ChainsPictures,
    CheckpointCell,
    LayerSpace,
    PicturedCheckpoint,
)
from chainmerge.documents.chains import ChainSummary
from chainmerge.documents.disk_map import DiskMap, MapColumn
from chainmerge.documents.scan import ScanFinding, Severity
from chainmerge.documents.trends import Forecast, Limited
from chainmerge.documents.versions import REPORT_VERSION
from tests.support import reports

MIB = 1 << 20
COLUMNS = 1000


def chain_pictures(name: str = "daily", images: int = 4, checkpoints: int = 3) -> ChainPictures:
    """A chain whose images differ from each other in all that is drawn; all names hold *name*."""
    paths = [f"/disks/{name}-{index}.qcow2" for index in range(images)]
    plan = reports.plan(name=name, base=paths[0], top=paths[-1], words=name)
    return ChainPictures(
        version=REPORT_VERSION,
        image=paths[-1],
        layers=tuple(_layer(path, index) for index, path in enumerate(paths)),
        map=DiskMap(
            virtual_size=COLUMNS * MIB,
            column_bytes=MIB,
            images=tuple(paths),
            columns=tuple(_column(index, images) for index in range(COLUMNS)),
        ),
        checkpoints=tuple(_checkpoint(f"{name}-{n}", n, images) for n in range(checkpoints)),
        checkpoints_left_out=7,
        plan=plan,
        problem=f"{name} is wrong",
    )


def chains_pictures(
    name: str = "daily", images: int = 4, checkpoints: int = 3, chains: int = 1
) -> ChainsPictures:
    """One chain that is drawn, and as many lines as are wanted."""
    return ChainsPictures(
        version=REPORT_VERSION,
        places=(f"/disks/{name}",),
        made_at=1_700_000_000,
        chains=tuple(_summary(f"/disks/{name}-{n}.qcow2", n, name) for n in range(chains)),
        findings=tuple(
            ScanFinding(name, severity, f"/disks/{name}", f"{name} is bad", {name: 1}, command)
            for severity in Severity
            for command in (f"chainmerge repair {name}", None)
        ),
        pictures=(chain_pictures(name, images, checkpoints),),
        problems=(f"{name} cannot be read",),
        forecasts=tuple(
            Forecast(kind, f"/disks/{name}", f"/disks/{name}-0.qcow2", 5 * MIB, 9 * MIB, 86_400, 4)
            for kind in Limited
        ),
    )


def _layer(path: str, index: int) -> LayerSpace:
    return LayerSpace(
        path=path,
        format="qcow2",
        file_size=(index + 3) * MIB,
        occupied_bytes=None if index % 5 == 4 else (index + 2) * MIB,
        visible_bytes=(index + 1) * MIB,
        hidden_bytes=index * MIB,
        metadata_bytes=MIB // 2,
        bitmap_bytes=MIB // 4,
    )


def _column(index: int, images: int) -> MapColumn:
    if index % 7 == 6:
        return MapColumn(None, 0, 0, MIB // 2)
    return MapColumn(index * 31 % images, MIB // (1 + index % 5), MIB, 0)


def _checkpoint(name: str, number: int, images: int) -> PicturedCheckpoint:
    states = ("valid", "disabled", "in-use", "disabled")
    return PicturedCheckpoint(
        name=name,
        usable=number % 2 == 0,
        reason=f"because of {name}",
        next_backup_bytes=None if number % 2 else number * MIB,
        cells=tuple(
            CheckpointCell(index, states[index % 4], index % 4 == 3, index * MIB)
            for index in range(images)
            if index % 5
        ),
    )


def _summary(leaf: str, number: int, words: str) -> ChainSummary:
    return ChainSummary(
        leaf=leaf,
        images=number + 1,
        virtual_size=1024 * MIB,
        occupied_bytes=number * MIB,
        base=None,
        freed_bytes=None if number % 4 == 3 else number * MIB,
        bytes_to_copy=0,
        unfinished=number % 2 == 1,
        users=None,
        problem=words if number % 4 == 3 else None,
    )
