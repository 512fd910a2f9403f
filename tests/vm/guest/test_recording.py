# SPDX-License-Identifier: Apache-2.0
"""Records the merges whose power cuts are looked at afterwards, outside of the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from tests.support.qemu import run
from tests.vm.guest.recording import RecordedDevice, record
from tests.vm.guest.volumes import MIB, fill, scratch_disk
from tests.vm.power.cases import CASES, LVM, XFS
from tests.vm.power.recordings import directory_of

if TYPE_CHECKING:
    from collections.abc import Iterator

EXTENT: Final = 256 << 10


@pytest.fixture(scope="module")
def physical_volume() -> Iterator[RecordedDevice]:
    device = RecordedDevice("recorded", scratch_disk("recorded"), 40 * MIB)
    device.create()
    fill(device.path)
    run("pvcreate", "-q", "-y", device.path)
    run("vgcreate", "-q", "-s", f"{EXTENT}b", "recorded-vg", device.path)
    yield device
    run("vgremove", "-q", "-ff", "-y", "recorded-vg")
    run("pvremove", "-q", "-ff", "-y", device.path)
    device.remove()


@pytest.fixture(scope="module")
def device_of_files() -> Iterator[RecordedDevice]:
    device = RecordedDevice("recorded-files", scratch_disk("files"), 48 * MIB)
    device.create()
    yield device
    device.remove()


@pytest.fixture(scope="module")
def larger_device_of_files() -> Iterator[RecordedDevice]:
    """As large as XFS asks for."""
    device = RecordedDevice("recorded-xfs", scratch_disk("xfs"), 304 * MIB)
    device.create()
    yield device
    device.remove()


@pytest.mark.parametrize("name", CASES)
def test_record(request: pytest.FixtureRequest, name: str) -> None:
    case = CASES[name]
    fixture = {LVM: "physical_volume", XFS: "larger_device_of_files"}.get(
        case.storage, "device_of_files"
    )
    device = request.getfixturevalue(fixture)
    record(case, device, scratch_disk("log"), directory_of(name))
