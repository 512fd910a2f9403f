# SPDX-License-Identifier: Apache-2.0
"""QEMU processes that live as long as a test, for tests that would else start thousands.

Between two calls no process has an image open.
"""

from __future__ import annotations

import hashlib
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from chainmerge.engines.qemu.daemon import StorageDaemon

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

_PROMPT = b"qemu-io> "


class QemuDisagrees(AssertionError):
    """QEMU did not do as told, or says something else than the test expected."""


@dataclass(frozen=True, slots=True)
class Fill:
    """Guest bytes [start, start + length) with the same value; 0 stands for zeroes."""

    start: int
    length: int
    value: int


class Guest:
    """Reads and writes disks as a guest does, through one qemu-io."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._kill()

    def write(self, image: Path, image_format: str, fills: Sequence[Fill]) -> None:
        """Write and close the image in good order."""
        self._open(image, image_format)
        self._write(fills)
        self._quietly("close")

    def write_and_be_killed(self, image: Path, image_format: str, fills: Sequence[Fill]) -> None:
        """What is written is durable, but the image is never closed."""
        self._open(image, image_format)
        self._write(fills)
        self._quietly("flush")
        self._kill()

    def require_content(self, image: Path, image_format: str, fills: Sequence[Fill]) -> None:
        """Fail unless the image reads like this, without changing it."""
        self._quietly(f"open -r -o driver={image_format} {image}")
        for fill in fills:
            command = f"read -P {fill.value} {fill.start} {fill.length}"
            self._expect(command, f"read {fill.length}/{fill.length} bytes")
        self._quietly("close")

    def _open(self, image: Path, image_format: str) -> None:
        self._quietly(f"open -o driver={image_format} {image}")

    def _write(self, fills: Sequence[Fill]) -> None:
        for fill in fills:
            content = f"-P {fill.value}" if fill.value else "-z"
            command = f"write {content} {fill.start} {fill.length}"
            self._expect(command, f"wrote {fill.length}/{fill.length} bytes")

    def _quietly(self, command: str) -> None:
        said = self._command(command)
        if said:
            raise QemuDisagrees(f"{command}: {said}")

    def _expect(self, command: str, beginning: str) -> None:
        said = self._command(command)
        if not said.startswith(beginning):
            raise QemuDisagrees(f"{command}: {said}")

    def _command(self, command: str) -> str:
        process = self._running()
        assert process.stdin is not None
        process.stdin.write(command.encode() + b"\n")
        process.stdin.flush()
        return self._said(process)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = subprocess.Popen(
                ["qemu-io"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
            )
            self._said(self._process)
        return self._process

    @staticmethod
    def _said(process: subprocess.Popen[bytes]) -> str:
        """What it says until it is ready for the next command."""
        assert process.stdout is not None
        said = b""
        while not said.endswith(_PROMPT):
            more = process.stdout.read(65536)
            if not more:
                raise QemuDisagrees(f"qemu-io is gone, its last words: {said.decode()}")
            said += more
        return said.removesuffix(_PROMPT).decode().strip()

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


@dataclass(frozen=True, slots=True)
class QemuBitmap:
    """A bitmap as QEMU loads it; ``digest`` as by :func:`digest_of`, of its bits."""

    granularity: int
    enabled: bool
    inconsistent: bool
    digest: str


def digest_of(serialised: bytes) -> str:
    """QEMU's digest of a bitmap's bits: SHA-256 of them in words of 64 bits."""
    words = max(-(-len(serialised) // 8), 1)
    return hashlib.sha256(serialised.ljust(8 * words, b"\0")).hexdigest()


class Host:
    """Manages the bitmaps of disks as libvirt does, through one qemu-storage-daemon."""

    def __init__(self) -> None:
        self._daemon = StorageDaemon()
        self._complaints = self._daemon.complaints

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._daemon.quit()
        self._daemon.__exit__(None, None, None)

    def add_bitmap(self, image: Path, name: str, granularity: int) -> None:
        with self._opened(image, read_only=False):
            options = {"granularity": granularity, "persistent": True}
            self._execute("block-dirty-bitmap-add", {"node": "disk", "name": name, **options})

    def remove_bitmap(self, image: Path, name: str) -> None:
        with self._opened(image, read_only=False):
            self._execute("block-dirty-bitmap-remove", {"node": "disk", "name": name})

    def disable_bitmap(self, image: Path, name: str) -> None:
        with self._opened(image, read_only=False):
            self._execute("block-dirty-bitmap-disable", {"node": "disk", "name": name})

    def bitmaps(self, image: Path) -> Mapping[str, QemuBitmap]:
        with self._opened(image, read_only=True):
            nodes = self._execute("query-named-block-nodes", {"flat": True})
            (disk,) = (node for node in nodes if node["node-name"] == "disk")
            return {
                bitmap["name"]: QemuBitmap(
                    bitmap["granularity"],
                    bitmap["recording"],
                    bitmap.get("inconsistent", False),
                    self._digest(bitmap),
                )
                for bitmap in disk.get("dirty-bitmaps", ())
            }

    def _digest(self, bitmap: Mapping[str, Any]) -> str:
        if bitmap.get("inconsistent"):
            return ""
        place = {"node": "disk", "name": bitmap["name"]}
        return str(self._execute("x-debug-block-dirty-bitmap-sha256", place)["sha256"])

    @contextmanager
    def _opened(self, image: Path, *, read_only: bool) -> Iterator[None]:
        """One image, without those below it."""
        file = {"driver": "file", "filename": str(image), "read-only": read_only}
        node = {"driver": "qcow2", "node-name": "disk", "read-only": read_only}
        self._execute("blockdev-add", {**node, "backing": None, "file": file})
        yield
        self._execute("blockdev-del", {"node-name": "disk"})
        # It loses bitmaps with an exit code of 0 and a word on standard error.
        if self._daemon.complaints != self._complaints:
            raise QemuDisagrees(self._daemon.complaints)

    def _execute(self, command: str, arguments: Mapping[str, object]) -> Any:
        return self._daemon.execute(command, arguments)
