# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.vm.guest.volumes import MIB, Group, create_group, remove_group, scratch_disk

if TYPE_CHECKING:
    from collections.abc import Iterator


SOAK = os.environ.get("CHAINMERGE_SOAK") == "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long runs are part of a soak only."""
    if SOAK:
        return
    long_runs = [item for item in items if item.get_closest_marker("soak")]
    config.hook.pytest_deselected(items=long_runs)
    items[:] = [item for item in items if not item.get_closest_marker("soak")]


@pytest.fixture(scope="session", autouse=True)
def _visible_devices() -> None:
    """LVM sees the disks that are meant for it, and not what lies below them."""
    seen = ("virtio-plain", "virtio-sectors4k", "/mapper/recorded$")
    accepted = ", ".join(f'"a!{pattern}!"' for pattern in seen)
    pattern = f'devices {{ global_filter = [ {accepted}, "r!.*!" ] }}\n'
    Path("/etc/lvm/lvmlocal.conf").write_text(pattern)


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    """A volume group with a dash in its name, on a disk full of old bytes."""
    disks = [scratch_disk("plain0"), scratch_disk("plain1")]
    created = create_group("chain-vg", disks, extent_size=MIB)
    yield created
    remove_group(created, disks)


@pytest.fixture(scope="module")
def group_of_large_sectors() -> Iterator[Group]:
    """The same on a disk of 4096-byte sectors."""
    disks = [scratch_disk("sectors4k")]
    created = create_group("large", disks, extent_size=MIB)
    yield created
    remove_group(created, disks)


@pytest.fixture(autouse=True)
def _no_volumes_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in ("group", "group_of_large_sectors"):
        if name in request.fixturenames:
            request.getfixturevalue(name).remove_volumes()
