# SPDX-License-Identifier: Apache-2.0
"""Where data is copied to, and what is copied there."""

import os
import random
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from chainmerge.storage.transfer.copying import (
    Produced,
    ReadBack,
    Transfer,
    TransferPort,
    transfer_into,
)

KIB: Final = 1 << 10
MIB: Final = 1 << 20
TARGET_BYTES: Final = 2 * MIB
SOURCE_BYTES: Final = MIB

KINDS: Final = ("ext4", "xfs", "btrfs", "tmpfs", "ramfs", "sectors of 512", "sectors of 4096")


def pattern(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


@dataclass
class Place:
    """Where targets and sources are made; a device is one target that is used again."""

    directory: Path
    device: Path | None = None

    def target(self, content: bytes) -> Path:
        path = self.device or self.directory / "target"
        with path.open("r+b" if self.device else "wb") as file:
            file.write(content)
            os.fsync(file.fileno())
        return path

    def source(self, name: str, content: bytes) -> Path:
        path = self.directory / name
        path.write_bytes(content)
        return path


on_every_kind = pytest.mark.parametrize("place", KINDS, indirect=True)


@dataclass
class Watch:
    """What a caller sees, and when it wants to stop."""

    stop_after: int | None = None
    progress: list[int] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    asked: int = 0

    def on_progress(self, done: int) -> None:
        self.progress.append(done)
        self.threads.add(threading.get_ident())

    def should_stop(self) -> bool:
        self.asked += 1
        return self.stop_after is not None and self.asked > self.stop_after


def watched(
    port: TransferPort,
    watch: Watch | None = None,
    bandwidth: int | None = None,
    read_back: ReadBack = ReadBack.COMPARED,
) -> Transfer:
    watch = watch or Watch()
    return transfer_into(
        port,
        on_progress=watch.on_progress,
        should_stop=watch.should_stop,
        bandwidth=bandwidth,
        read_back=read_back,
    )


def produced(at: int, data: bytes) -> Produced:
    return Produced(at, len(data), lambda: data)
