# SPDX-License-Identifier: Apache-2.0
"""Overlays that name whatever backing file a test wants, also ones that qemu-img would not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support import qemu

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 1 << 20


def overlay(image: Path, backing: str | Path, backing_format: str | None = "qcow2") -> Path:
    """Create an overlay of 1 MiB without a look at the backing file."""
    options = f"backing_file={backing}"
    if backing_format is not None:
        options += f",backing_fmt={backing_format}"
        qemu.qemu_img("create", "-q", "-u", "-f", "qcow2", "-o", options, image, str(SIZE))
        return image
    # qemu-img no longer creates these, but it cannot help reading them.
    overlay(image, backing)
    content = bytearray(image.read_bytes()[:65536])
    extension = content.index(bytes.fromhex("e2792aca") + (5).to_bytes(4, "big") + b"qcow2")
    content[extension : extension + 4] = b"\0\0\0\1"  # an extension that nobody knows
    with image.open("r+b") as file:
        file.write(content)
    return image


def raw(image: Path, content: bytes = b"") -> Path:
    """Create a raw image of 1 MiB that begins with *content*."""
    image.write_bytes(content.ljust(SIZE, b"\0"))
    return image
