# SPDX-License-Identifier: Apache-2.0
"""The scattered case where files can share extents: XFS and Btrfs, each on a loop device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from benchmarks.images import GIB
from benchmarks.scattered import scattered_in
from tests.support.loopdev import mounted_file_system

if TYPE_CHECKING:
    from collections.abc import Iterable

    from benchmarks.harness import Comparison, Settings

_SIZE: Final = 16 * GIB
# Without it the page cache below the loop device takes what was to go to the disk.
_PAST_THE_CACHE: Final = "--direct-io=on"


def scattered_on_xfs(settings: Settings) -> Iterable[Comparison]:
    """16,000 random clusters of a 100 GiB disk, on XFS."""
    return _scattered_on(settings, "xfs", "XFS")


def scattered_on_btrfs(settings: Settings) -> Iterable[Comparison]:
    """16,000 random clusters of a 100 GiB disk, on Btrfs."""
    return _scattered_on(settings, "btrfs", "Btrfs")


def _scattered_on(settings: Settings, kind: str, name: str) -> Iterable[Comparison]:
    with mounted_file_system(settings.scratch, kind, _SIZE, losetup=(_PAST_THE_CACHE,)) as mounted:
        yield from scattered_in(settings, mounted, f", {name}")
