# SPDX-License-Identifier: Apache-2.0
"""Storage that the tests of this directory share."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests.support.fake_lvm import FakeLvm
from tests.support.loopdev import mounted_file_system

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def file_systems(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Mounted file systems by name; tests leave them as empty as they find them."""
    # The smallest that their mkfs makes; sparse, so they cost next to nothing.
    sizes = {"xfs": 300 << 20, "btrfs": 128 << 20, "ext4": 64 << 20, "ext2": 64 << 20}
    directory = tmp_path_factory.mktemp("file-systems")
    with ExitStack() as stack:
        yield {
            kind: stack.enter_context(mounted_file_system(directory, kind, size))
            for kind, size in sizes.items()
        }


@pytest.fixture
def fake_lvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeLvm:
    """The fake lvm command, on PATH, with no volume groups yet."""
    directory = tmp_path / "lvm"
    directory.mkdir()
    lvm = FakeLvm(directory)
    lvm.install(monkeypatch)
    return lvm
