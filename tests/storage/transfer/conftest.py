# SPDX-License-Identifier: Apache-2.0
"""Every kind of storage that data is copied to."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.storage.transfer.places import MIB, TARGET_BYTES, Place
from tests.support.loopdev import (
    loop_device,
    mounted_ramfs,
    mounted_tmpfs,
)


@pytest.fixture(scope="module")
def places(
    file_systems: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Place]]:
    directory = tmp_path_factory.mktemp("places")
    with ExitStack() as stack:
        found = {kind: Place(file_systems[kind]) for kind in ("ext4", "xfs", "btrfs")}
        found["tmpfs"] = Place(stack.enter_context(mounted_tmpfs(directory, 32 * MIB)))
        found["ramfs"] = Place(stack.enter_context(mounted_ramfs(directory)))
        for sector in (512, 4096):
            device = stack.enter_context(
                loop_device(directory / f"device-{sector}", TARGET_BYTES, sector_size=sector)
            )
            found[f"sectors of {sector}"] = Place(directory, device)
        yield found
        for kind in ("ext4", "xfs", "btrfs"):
            for path in file_systems[kind].iterdir():
                if path.is_file():
                    path.unlink()


@pytest.fixture
def place(request: pytest.FixtureRequest, places: dict[str, Place]) -> Place:
    return places[request.param]
