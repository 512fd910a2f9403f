# SPDX-License-Identifier: Apache-2.0
"""What the machine that runs the tests can do, for the header of a test run."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Final

from tests.support.loopdev import loop_device
from tests.support.qemu import ToolFailed

FILE_SYSTEMS: Final = ("ext4", "xfs", "btrfs")


def qemu_version() -> str:
    """The version of qemu-img in words, or what is wrong with it."""
    if shutil.which("qemu-img") is None:
        return "no qemu-img"
    result = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, check=False)
    first_line = result.stdout.partition("\n")[0]
    return first_line.removeprefix("qemu-img version ") or f"qemu-img exits {result.returncode}"


def qemu_major() -> int:
    """The first number of qemu-img's version; 0 where there is none."""
    number = qemu_version().partition(".")[0]
    return int(number) if number.isdigit() else 0


@cache
def has_loop_devices() -> bool:
    """Whether a loop device can be had: by asking for one, for a node alone says little."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with loop_device(Path(scratch) / "backing", 1 << 20):
                return True
        except (OSError, ToolFailed):
            return False


def mountable_file_systems() -> tuple[str, ...]:
    """Those of :data:`FILE_SYSTEMS` that this kernel knows and that there is a mkfs for."""
    known = Path("/proc/filesystems").read_text(encoding="ascii").split()
    return tuple(fs for fs in FILE_SYSTEMS if fs in known and shutil.which(f"mkfs.{fs}"))


def capabilities() -> list[str]:
    """The machine in a few lines."""
    file_systems = ", ".join(mountable_file_systems()) or "none"
    loop = "yes" if has_loop_devices() else "no"
    who = "root" if os.geteuid() == 0 else "not root"
    return [
        f"Linux {platform.release()}, {os.cpu_count()} CPUs, {who}",
        f"QEMU {qemu_version()}",
        f"loop devices: {loop}; file systems: {file_systems}",
    ]
