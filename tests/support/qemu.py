# SPDX-License-Identifier: Apache-2.0
"""QEMU's own tools, as the tests call them: to build images and as the oracle."""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ToolFailed(AssertionError):
    """A QEMU tool exited with a status that the test did not expect."""


def run(*argv: str | Path, expect: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; any exit status not in *expect* fails the test."""
    result = subprocess.run(
        [str(arg) for arg in argv],
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        check=False,
    )
    if result.returncode not in expect:
        command = " ".join(str(arg) for arg in argv)
        raise ToolFailed(f"{command}: exit {result.returncode}\n{result.stdout}{result.stderr}")
    return result


def qemu_img(*argv: str | Path, expect: tuple[int, ...] = (0,)) -> str:
    """Run qemu-img and return its standard output."""
    return run("qemu-img", *argv, expect=expect).stdout


def qemu_io(image: Path, *commands: str, fmt: str = "qcow2", options: tuple[str, ...] = ()) -> str:
    """Run qemu-io commands on an image, in one process."""
    argv: list[str | Path] = ["qemu-io", "-f", fmt, *options]
    for command in commands:
        argv += ["-c", command]
    return run(*argv, image).stdout


def create(
    image: Path,
    size: int | None = None,
    *,
    backing: Path | str | None = None,
    backing_format: str = "qcow2",
    fmt: str = "qcow2",
    **options: str | int,
) -> Path:
    """Create an image; ``options`` are qcow2 creation options with ``_`` for ``-``."""
    argv: list[str | Path] = ["create", "-q", "-f", fmt]
    if options:
        argv += ["-o", ",".join(f"{key}={value}" for key, value in options.items())]
    if backing is not None:
        argv += ["-b", backing, "-F", backing_format]
    argv.append(image)
    if size is not None:
        argv.append(str(size))
    qemu_img(*argv)
    return image


def info(image: Path) -> dict[str, Any]:
    """`qemu-img info` of one image, without looking at its backing files."""
    result: dict[str, Any] = json.loads(qemu_img("info", "--output=json", "-U", image))
    return result


def info_of_chain(image: Path) -> list[dict[str, Any]]:
    """`qemu-img info` of an image and of all below it, from the top down."""
    out = qemu_img("info", "--output=json", "-U", "--backing-chain", image)
    result: list[dict[str, Any]] = json.loads(out)
    return result


def mapping(image: Path) -> list[dict[str, Any]]:
    """`qemu-img map` of an image: which image of the chain each run comes from, and how."""
    result: list[dict[str, Any]] = json.loads(qemu_img("map", "--output=json", "-U", image))
    return result


def check(image: Path, fmt: str = "qcow2") -> dict[str, Any]:
    """`qemu-img check`: its JSON, with keys ``corruptions`` and ``leaks`` always there."""
    out = qemu_img("check", "-f", fmt, "--output=json", "-U", image, expect=(0, 2, 3))
    report: dict[str, Any] = json.loads(out)
    report.setdefault("corruptions", 0)
    report.setdefault("leaks", 0)
    return report


def assert_clean(image: Path) -> None:
    """Fail unless `qemu-img check` finds neither corruption nor leaks."""
    report = check(image)
    assert (report["corruptions"], report["leaks"]) == (0, 0), report


def content(image: Path, fmt: str = "qcow2") -> bytes:
    """The guest-visible content of a (small) image, as `qemu-img convert` reads it."""
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "raw"
        qemu_img("convert", "-U", "-f", fmt, "-O", "raw", image, raw)
        return raw.read_bytes()


def bitmap_names(image: Path) -> dict[str, dict[str, Any]]:
    """The bitmaps that `qemu-img info` lists, by name."""
    specific = info(image).get("format-specific", {}).get("data", {})
    return {bitmap["name"]: bitmap for bitmap in specific.get("bitmaps", [])}


@dataclass(frozen=True)
class DirtyRange:
    """A run of dirty guest bytes."""

    start: int
    length: int


def dirty_ranges(image: Path, name: str) -> list[DirtyRange]:
    """The dirty ranges of a persistent bitmap as QEMU itself reads and exports them over NBD."""
    with tempfile.TemporaryDirectory() as scratch:
        socket = Path(scratch) / "nbd"
        pidfile = Path(scratch) / "pid"
        run(
            "qemu-nbd", "--fork", "--pid-file", pidfile, "-r", "-k", socket, "-f", "qcow2",
            "-B", name, image,
        )  # fmt: skip
        options = {
            "driver": "nbd",
            "server": {"type": "unix", "path": str(socket)},
            "x-dirty-bitmap": f"qemu:dirty-bitmap:{name}",
        }
        server = os.pidfd_open(int(pidfile.read_text()))
        try:
            # The export ends with its last client, and qemu-nbd with it, which has the image open.
            out = qemu_img("map", "--output=json", "json:" + json.dumps(options))
            select.select([server], [], [])
        finally:
            os.close(server)
    # qemu-img map shows a dirty extent as one without data.
    return [
        DirtyRange(extent["start"], extent["length"])
        for extent in json.loads(out)
        if not extent["data"]
    ]
