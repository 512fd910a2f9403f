# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' images of metadata alone, with QEMU as the judge."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.metadata_images import write_allocated_image
from tests.support.images import GIB, KIB, MIB
from tests.support.qemu import assert_clean, check

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("disk_size", [64 * KIB, 512 * MIB, 512 * MIB + 512, 9 * GIB])
def test_qemu_finds_every_cluster_allocated_and_nothing_wrong(
    tmp_path: Path, disk_size: int, shuffled: bool
) -> None:
    image = tmp_path / "image.qcow2"
    total = write_allocated_image(image, disk_size, shuffled=shuffled)
    assert_clean(image)
    report = check(image)
    assert report["allocated-clusters"] == report["total-clusters"] == -(-disk_size // (64 * KIB))
    assert image.stat().st_size == total * 64 * KIB


def test_only_a_shuffled_image_is_fragmented(tmp_path: Path) -> None:
    for shuffled, fragmented in ((False, 1), (True, 0.99 * GIB / (64 * KIB))):
        image = tmp_path / f"{shuffled}.qcow2"
        write_allocated_image(image, GIB, shuffled=shuffled)
        found = check(image).get("fragmented-clusters", 0)
        assert found >= fragmented if shuffled else found <= fragmented
