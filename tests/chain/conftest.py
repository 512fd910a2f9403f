# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.qemu import run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Make loop devices of 4 MiB; the name is that of the file behind."""
    devices = []

    def attach(name: str) -> Path:
        behind = tmp_path / name
        with behind.open("xb") as file:
            file.truncate(4 << 20)
        device = Path(run("losetup", "--find", "--show", behind).stdout.strip())
        devices.append(device)
        return device

    yield attach
    for device in devices:
        run("losetup", "--detach", device)


@pytest.fixture
def device_directory() -> Iterator[Path]:
    """A directory under /dev, as each volume group has one for the links to its volumes."""
    directory = Path(f"/dev/chainmerge-test-{os.getpid()}")
    directory.mkdir()
    yield directory
    shutil.rmtree(directory)
