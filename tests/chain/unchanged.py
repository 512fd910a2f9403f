# SPDX-License-Identifier: Apache-2.0
"""That something leaves a directory as it was."""

from __future__ import annotations

import hashlib
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import pytest

from chainmerge.errors import ChainmergeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

AnyError = TypeVar("AnyError", bound=ChainmergeError)


def state(directory: Path) -> dict[str, tuple[object, ...]]:
    """Everything below a directory: kind, inode, times, and the content of files and links."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        content = ""
        if stat.S_ISLNK(status.st_mode):
            content = str(path.readlink())
        elif stat.S_ISREG(status.st_mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path)] = (status.st_mode, status.st_ino, status.st_mtime_ns, content)
    return found


@contextmanager
def unchanged(directory: Path) -> Iterator[None]:
    """Fail if the body changes anything below *directory*."""
    before = state(directory)
    yield
    assert state(directory) == before


def refusal(error: type[AnyError], directory: Path, action: Callable[[], object]) -> AnyError:
    """The error with which *action* fails, leaving *directory* unchanged.

    It must be of exactly this type and have something to say.
    """
    with unchanged(directory), pytest.raises(error) as caught:
        action()
    assert type(caught.value) is error
    for text in (caught.value.sentence, caught.value.advice, caught.value.explanation):
        assert text
        assert text.isprintable()
    return caught.value
