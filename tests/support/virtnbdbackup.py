# SPDX-License-Identifier: Apache-2.0
"""Debian's virtnbdbackup, run as an administrator runs it."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def _run(*words: str | Path) -> str:
    # It belongs to the system's Python, not to the one that runs the tests.
    strange = ("PYTHON", "VIRTUAL_ENV")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(strange)}
    done = subprocess.run(
        [str(word) for word in words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        text=True,
        errors="replace",
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def back_up(uri: str, domain: str, level: str, target: Path) -> str:
    """Back a running domain up into a directory; returns what the program has said."""
    scratch = target.with_name("scratch")
    scratch.mkdir(exist_ok=True)
    return _run(
        *("virtnbdbackup", "--uri", _local(uri), "--domain", domain, "--level", level),
        *("--noprogress", "--scratchdir", scratch, "--output", target),
    )


def restore(uri: str, source: Path, target: Path) -> list[Path]:
    """Restore the disks of a backup, increments included, into a directory."""
    target.mkdir()
    places = ("--uri", _local(uri), "--input", source, "--output", target)
    _run("virtnbdrestore", *places, "--noprogress")
    return sorted(path for path in target.iterdir() if path.suffix == ".qcow2")


def _local(uri: str) -> str:
    """The same URI, without a scheme that it takes for one of another machine."""
    return uri.replace("qemu+unix:", "qemu:")
