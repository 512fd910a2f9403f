# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chainmerge.chain.layers import layer_of_raw
from chainmerge.chain.view import GuestView
from chainmerge.engines.native import survey
from chainmerge.engines.native.decisions import MappedDisk
from chainmerge.engines.native.survey import MappingNeed, survey_mapping
from chainmerge.options import Direction, Placement
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.readable import BytesReadable
from tests.support import qemu
from tests.support.images import GIB, KIB, MIB, SECTOR

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "small clusters": (192 * MIB, {"cluster_size": 512}),
    "version 2": (192 * MIB, {"cluster_size": 512, "compat": "0.10"}),
    "subclusters": (6 * GIB, {"cluster_size": "16k", "extended_l2": "on"}),
}


@dataclass(frozen=True)
class AllData:
    """Something of a size, taken for data as a whole, that nobody reads."""

    size: int
    name: str = "all data"

    def read(self, offset: int, length: int) -> bytes:
        raise AssertionError(offset, length)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Qcow2Image]:
    directory: Path = tmp_path_factory.mktemp("bases")
    images = {}
    for name, (size, options) in KINDS.items():
        path = qemu.create(directory / f"{name}.qcow2", size, **options)
        images[name] = Qcow2Image(BytesReadable(name, path.read_bytes()))
    return images


@given(
    kind=st.sampled_from(sorted(KINDS)),
    eighths=st.integers(0, 10),
    sectors=st.integers(-200, 200),
    direction=st.sampled_from(Direction),
    backing_end=st.integers(0, 64).map(lambda count: count * 7 * KIB),
)
@settings(deadline=None)
def test_windows_of_data_are_counted_as_if_cluster_by_cluster(
    bases: dict[str, Qcow2Image],
    kind: str,
    eighths: int,
    sectors: int,
    direction: Direction,
    backing_end: int,
) -> None:
    base = bases[kind]
    base_size = base.header.virtual_size
    top_size = max(SECTOR, base_size // 8 * eighths + sectors * SECTOR)
    above = GuestView((layer_of_raw(AllData(top_size)),))
    disk = MappedDisk(base.header, max(base_size, top_size), backing_end, direction)
    at_once = _numbers(survey_mapping(base, disk, above))
    with mock.patch.object(survey, "_is_all_data", return_value=False):
        assert at_once == _numbers(survey_mapping(base, disk, above))


def _numbers(needs: Mapping[Placement, MappingNeed]) -> dict[Placement, tuple[int, ...]]:
    return {
        placement: (need.data, need.tables, need.written, need.given_up, need.unpacked)
        for placement, need in needs.items()
    }
