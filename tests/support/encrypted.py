# SPDX-License-Identifier: Apache-2.0
"""Chains of images that may be encrypted, each with a passphrase of its own."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chainmerge
from chainmerge.options import MergeOptions
from tests.support.images import create_encrypted
from tests.support.live_scenario import stored_bits
from tests.support.qemu import create, run

if TYPE_CHECKING:
    from collections.abc import Sequence

MIB = 1 << 20
DISK = 8 * MIB


@dataclass(frozen=True)
class Encrypted:
    """A chain of images that may be encrypted, each with a passphrase of its own."""

    images: tuple[Path, ...]
    key_files: dict[str, str]

    @property
    def base(self) -> Path:
        return self.images[0]

    @property
    def top(self) -> Path:
        return self.images[-1]

    @property
    def options(self) -> MergeOptions:
        return MergeOptions(key_files=self.key_files)

    def secrets(self) -> list[str]:
        return [
            part
            for number, image in enumerate(self.images)
            if (key := self.key_files.get(str(image))) is not None
            for part in ("--object", f"secret,id=key{number},file={key}")
        ]

    def node(self, number: int) -> dict[str, Any]:
        """The image and all below it as QEMU's options."""
        image = self.images[number]
        node: dict[str, Any] = {
            "driver": "qcow2",
            "file": {"driver": "file", "filename": str(image)},
            "backing": self.node(number - 1) if number else None,
        }
        if str(image) in self.key_files:
            node["encrypt"] = {"format": "luks", "key-secret": f"key{number}"}
        return node

    def write(self, number: int, *commands: str) -> None:
        name = "json:" + json.dumps(self.node(number))
        run("qemu-io", *self.secrets(), name, *(part for one in commands for part in ("-c", one)))

    def content(self, number: int) -> bytes:
        raw = self.base.parent / "raw"
        name = "json:" + json.dumps(self.node(number))
        run("qemu-img", "convert", *self.secrets(), "-O", "raw", name, raw)
        return raw.read_bytes()

    def checksums(self) -> list[str]:
        return [hashlib.sha256(image.read_bytes()).hexdigest() for image in self.images]

    def assert_merged(self, content: bytes) -> None:
        assert self.content(0) == content
        run("qemu-img", "check", "-q", *self.secrets(), "json:" + json.dumps(self.node(0)))
        count = len(self.images)
        assert stored_bits(self.base)["both"] == {*range(16), *range(48, 48 + 8 * count - 8)}
        assert set(stored_bits(self.base)) == {"both"}


def build(directory: Path, kinds: str, sizes: Sequence[int] | None = None) -> Encrypted:
    directory.mkdir(exist_ok=True)
    images: list[Path] = []
    keys: dict[str, str] = {}
    for number, kind in enumerate(kinds):
        image = directory / _name(number)
        size = sizes[number] if sizes else DISK
        backing = images[-1] if images else None
        if kind == "E":
            key = directory / f"key{number}"
            key.write_text(_passphrase(number))
            keys[str(image)] = str(key)
            image.write_bytes(_encrypted(number, size))
        elif backing is None:
            create(image, size)
        else:
            named = ("-u", "-b", backing, "-F", "qcow2")
            run("qemu-img", "create", "-q", "-f", "qcow2", *named, image, str(size))
        chainmerge.bitmaps_add(image, "both")
        images.append(image)
    for number in range(3):
        chainmerge.bitmaps_add(images[0], f"stale-{number}")
    chain = Encrypted(tuple(images), keys)
    chain.write(0, "write -q -P 1 0 1M")
    for number in range(1, len(images)):
        # Over what is below it, and where there is nothing yet.
        place = 3 * MIB + (number - 1) * MIB // 2
        chain.write(number, f"write -q -P {number + 1} 512k 256k", f"write -q -P 9 {place} 512k")
    return chain


def _passphrase(number: int) -> str:
    return f"passphrase {number}"


@cache
def _encrypted(number: int, size: int) -> bytes:
    """A new image, which takes seconds to create: a file, with the backing file of its place."""
    with tempfile.TemporaryDirectory() as scratch:
        secret = ("--object", f"secret,id=key,data={_passphrase(number)}")
        backing = Path(_name(number - 1)) if number else None
        image = create_encrypted(
            Path(scratch) / _name(number), size, secret=secret, backing=backing
        )
        return image.read_bytes()


def _name(number: int) -> str:
    return f"{number}.qcow2"
