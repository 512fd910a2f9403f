# SPDX-License-Identifier: Apache-2.0
"""What an operator has before him: chains of images, the program on his PATH, merges that died."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Final

from tests.support.cli import COMMAND, SOURCES, environment
from tests.support.images import MIB
from tests.support.qemu import create, qemu_img, qemu_io

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

DISK: Final = 64 * MIB
SNAPSHOTS: Final = ("base", "snap1", "snap2", "active")


def chain(directory: Path, names: Sequence[str] = SNAPSHOTS, mib: int = 2) -> list[Path]:
    """Images in one directory, each on the one before, with so many MiB of its own data.

    The first MiB of each hides the last one of the image below.
    """
    images: list[Path] = []
    for number, name in enumerate(names):
        path = directory / f"{name}.qcow2"
        if images:
            create(path, backing=images[-1].name)
        else:
            create(path, DISK)
        qemu_io(path, f"write -P {number % 250 + 1} {number * (mib - 1) % 48}M {mib}M")
        images.append(path)
    return images


def installed(folder: Path) -> Path:
    """A directory with the program ``chainmerge``, as an installation has it."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "chainmerge"
    sources = f"PYTHONPATH={SOURCES} XDG_CONFIG_HOME=/dev/null"
    script.write_text(f'#!/bin/sh\nexec env {sources} {sys.executable} -m chainmerge "$@"\n')
    script.chmod(0o755)
    return folder


def kill_while_copying(base: Path, *arguments: str) -> None:
    """Run ``chainmerge merge`` beside *base* and kill it once it has noted how far it has come.

    It is slowed down to 2 MiB a second, so several times that has to be there to copy.
    """
    process = subprocess.Popen(
        [*COMMAND, "merge", "--bandwidth", "2M", *arguments],
        cwd=base.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    journal = base.parent / f".{base.name}.chainmerge-journal"
    nap = threading.Event()
    try:
        while not (journal.exists() and b'"copied":{' in journal.read_bytes().replace(b" ", b"")):
            assert process.poll() is None, "it ended before it had noted anything"
            nap.wait(0.05)
    finally:
        process.kill()
        process.wait()


def break_bitmap(image: Path, name: str) -> None:
    """Have QEMU die with the image open: its bitmap was being written then."""
    qemu_img("bitmap", "--add", image, name)
    process = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    # It prompts once the image is open.
    process.stdout.read(1)
    process.kill()
    process.communicate()


def path_with(program: Path) -> str:
    """The PATH on which a program in that directory is found first."""
    return f"{program}:{os.environ['PATH']}"
