# SPDX-License-Identifier: Apache-2.0
"""Images to merge, and merges of them that are killed at a point."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import chainmerge
from chainmerge.merging import concluding, settling
from chainmerge.options import MergeOptions
from tests.support.qemu import (
    assert_clean,
    bitmap_names,
    content,
    create,
    dirty_ranges,
    info,
    qemu_img,
    qemu_io,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from chainmerge.documents.merge import MergeReport
    from chainmerge.documents.status import UnfinishedMerge


MIB = 1 << 20
# The package has a function of that name.
native_commit = importlib.import_module("chainmerge.engines.native.commit")
OPTIONS = {
    "neither": MergeOptions(),
    "delete": MergeOptions(delete=True),
    "keep-name": MergeOptions(direction="commit", keep_name=True),
    "both": MergeOptions(delete=True, direction="commit", keep_name=True),
}
LEVELS = (1, 2)


@dataclass(frozen=True)
class Images:
    """A chain base <- (mid <-) top <- leaf."""

    directory: Path
    levels: int

    @property
    def base(self) -> Path:
        return self.directory / "base.qcow2"

    @property
    def top(self) -> Path:
        return self.directory / "top.qcow2"

    @property
    def leaf(self) -> Path:
        return self.directory / "leaf.qcow2"

    def result(self, options: MergeOptions) -> Path:
        return self.top if options.keep_name else self.base

    def merge(self, options: MergeOptions, **more: Any) -> MergeReport:
        return chainmerge.merge(self.top, self.base, options=options, **more)


def build(directory: Path, levels: int) -> Images:
    directory.mkdir()
    images = Images(directory, levels)
    create(images.base, 8 * MIB)
    for name in ("everywhere", "broken", "stale"):
        qemu_img("bitmap", "--add", images.base, name)
    qemu_io(images.base, "write -P 1 0 2M", "write -P 1 7M 64k")
    qemu_img("bitmap", "--disable", images.base, "broken")
    below = images.base
    if levels == 2:
        mid = create(directory / "mid.qcow2", backing=below.name)
        for name in ("everywhere", "broken"):
            qemu_img("bitmap", "--add", mid, name)
        qemu_io(mid, "write -P 2 1M 2M")
        below = mid
    create(images.top, backing=below.name)
    # "new" is in top and above only: once base has it, an image in between is a gap.
    for name in ("everywhere", "new", "broken"):
        qemu_img("bitmap", "--add", images.top, name)
    qemu_io(images.top, "write -P 3 2M 2M", "write -z 7M 64k")
    create(images.leaf, backing=images.top.name)
    for name in ("everywhere", "new"):
        qemu_img("bitmap", "--add", images.leaf, name)
    qemu_io(images.leaf, "write -P 4 4M 1M")
    return images


Outcome = dict[str, Any]


def outcome(images: Images, options: MergeOptions) -> Outcome:
    """All that a merge decides about."""
    result = images.result(options)
    assert_clean(result)
    bitmaps = bitmap_names(result)
    return {
        "leaf": content(images.leaf),
        "result": content(result),
        "flags": {name: bitmap["flags"] for name, bitmap in bitmaps.items()},
        "bits": {
            name: dirty_ranges(result, name)
            for name, bitmap in bitmaps.items()
            if bitmap["flags"] == ["auto"]
        },
        "images": sorted(path.name for path in images.directory.glob("*.qcow2")),
        "backing": {
            path.name: info(path).get("backing-filename")
            for path in images.directory.glob("*.qcow2")
        },
    }


def unfinished(path: Path) -> tuple[UnfinishedMerge, ...]:
    """Without those that other tests do on devices at the same time."""
    found = chainmerge.status([path]).merges
    return tuple(merge for merge in found if not merge.base.startswith("/dev/"))


def copy(images: Images, directory: Path) -> Images:
    shutil.copytree(images.directory, directory)
    return Images(directory, images.levels)


def die(*_args: object, **_more: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def dies_once_called(module: Any, name: str) -> Callable[[], None]:
    assert hasattr(module, name)
    return lambda: setattr(module, name, die)


def dies_after(module: Any, name: str) -> Callable[[], None]:
    def arrange() -> None:
        original = getattr(module, name)

        def then_die(*args: Any, **more: Any) -> None:
            original(*args, **more)
            die()

        setattr(module, name, then_die)

    return arrange


# Where a merge can be killed once base is switched, in order.
AFTER_SWITCH: dict[str, Callable[[], None]] = {
    "release": dies_once_called(native_commit, "_release"),
    "released": dies_after(native_commit, "_release"),
    "switched": dies_once_called(concluding, "settle"),
    "repoint": dies_once_called(settling, "repoint"),
    "repointed one": dies_after(settling, "change_backing"),
    "record": dies_once_called(settling, "record_intent"),
    "recorded": dies_after(settling, "record_intent"),
    "rename": dies_once_called(settling, "rename_base"),
    "renamed": dies_after(settling, "rename_base"),
    "delete": dies_once_called(settling, "delete_recorded"),
    "deleted one": dies_after(Path, "unlink"),
    "deleted": dies_after(settling, "delete_recorded"),
    "forget": dies_once_called(settling, "forget_saved_bitmaps"),
    "tidy": dies_once_called(concluding, "_drop_spent_tombstones"),
    "tidied": dies_after(concluding, "replace_bitmaps"),
    "give back": dies_once_called(concluding, "give_back"),
    "end": dies_once_called(concluding, "forget_journal"),
}


def killed(images: Images, options: MergeOptions, arrange: Callable[[], None]) -> None:
    """Merge in a child process that kills itself where *arrange* made it to."""
    pid = os.fork()
    if pid == 0:
        try:
            arrange()
            images.merge(options)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def only(merges: tuple[UnfinishedMerge, ...]) -> UnfinishedMerge:
    assert len(merges) == 1
    return merges[0]
