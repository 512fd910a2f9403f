# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints a backup of all disks of a VM can use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

import chainmerge
from chainmerge.bitmaps.listing import shared_checkpoints
from chainmerge.documents.bitmaps import (
    BitmapListing,
    BitmapsOfDisks,
    BitmapVerdict,
    DiskGap,
    SharedCheckpoint,
)
from tests.support.cli import chainmerge as command
from tests.support.qemu import create

if TYPE_CHECKING:
    from pathlib import Path


def disk(image: str, **verdicts: str) -> BitmapListing:
    """A disk with checkpoints that pass, or do not for the reason given."""
    found = (BitmapVerdict(name, not why, why or "fine") for name, why in verdicts.items())
    return BitmapListing(1, image, (), tuple(found))


NONE = "no bitmap of this name"
CASES = {
    "no disk": ((), ()),
    "on every disk": (
        (disk("a", daily=""), disk("b", daily="")),
        (SharedCheckpoint("daily", usable=True, gaps=()),),
    ),
    "not on one disk": (
        (disk("a", daily=""), disk("b")),
        (SharedCheckpoint("daily", usable=False, gaps=(DiskGap("b", NONE),)),),
    ),
    "broken on one disk": (
        (disk("a", daily="a gap"), disk("b", daily="")),
        (SharedCheckpoint("daily", usable=False, gaps=(DiskGap("a", "a gap"),)),),
    ),
    "each on another disk": (
        (disk("a", monday=""), disk("b", tuesday="")),
        (
            SharedCheckpoint("monday", usable=False, gaps=(DiskGap("b", NONE),)),
            SharedCheckpoint("tuesday", usable=False, gaps=(DiskGap("a", NONE),)),
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_has_to_be_on_all_disks(case: str) -> None:
    disks, expected = CASES[case]
    assert shared_checkpoints(disks) == expected


@pytest.fixture
def disks(tmp_path: Path) -> list[Path]:
    """Two disks in chains of two: ``daily`` is sound on both, ``weekly`` on the first only."""
    leaves = []
    for name in ("vda", "vdb"):
        base = create(tmp_path / f"{name}-base.qcow2", 1 << 20)
        leaf = create(tmp_path / f"{name}.qcow2", backing=base)
        for image in (base, leaf):
            chainmerge.bitmaps_add(image, "daily")
        chainmerge.bitmaps_add(leaf, "weekly")
        leaves.append(leaf)
    chainmerge.bitmaps_add(tmp_path / "vda-base.qcow2", "stale")
    chainmerge.bitmaps_remove(leaves[1], ["weekly"])
    return leaves


def test_disks_of_a_vm(disks: list[Path]) -> None:
    told = command("bitmaps", "list", "--json", *disks).out
    found = msgspec.json.decode(told, type=BitmapsOfDisks)
    assert [one.image for one in found.disks] == list(map(str, disks))
    assert {one.name: one.usable for one in found.checkpoints} == {
        "daily": True,
        "stale": False,
        "weekly": False,
    }
    shown = command("bitmaps", "list", *disks).out
    assert "Checkpoints of all disks" in shown
    assert f"{disks[1]}: {NONE}" in " ".join(shown.split())
