# SPDX-License-Identifier: Apache-2.0
"""Files that get the inode number of a deleted one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

_ATTEMPTS = 200


def made_again(file: Path, number: int) -> Path:
    """Make *file*, empty, with an inode number that was another's.

    Skips the test on a file system that does not use numbers again.
    """
    others = []
    try:
        for attempt in range(_ATTEMPTS):
            file.write_bytes(b"")
            if file.stat().st_ino == number:
                return file
            others.append(file.rename(file.with_name(f"other-{attempt}")))
    finally:
        for other in others:
            other.unlink()
    pytest.skip("this file system does not use inode numbers again")
