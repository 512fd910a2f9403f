# SPDX-License-Identifier: Apache-2.0
"""Chains, and merges of them that are killed."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from chainmerge.options import MergeOptions
from tests.support.cli import COMMAND, environment
from tests.support.qemu import create, qemu_io

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


MIB = 1 << 20
DELETE = MergeOptions(delete=True)


def chain(directory: Path, *names: str) -> list[Path]:
    """Images of the given names, each on the one before; every one has data of its own."""
    images: list[Path] = []
    for number, name in enumerate(names):
        path = directory / f"{name}.qcow2"
        if images:
            create(path, backing=images[-1].name)
        else:
            create(path, 8 * MIB)
        qemu_io(path, f"write -P {number + 1} {number}M 2M")
        images.append(path)
    return images


def killed(work: Callable[[], object]) -> None:
    """Do it in a process that kills itself in it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def die(*_args: object, **_more: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def killed_at(owner: object, name: str, work: Callable[[], object]) -> None:
    """Do it in a process that kills itself instead of calling what *name* is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, die)
        killed(work)


def killed_at_call(owner: object, name: str, number: int, work: Callable[[], object]) -> None:
    """The same, in place of one of its calls, counted from 1."""
    real: Any = getattr(owner, name)
    left = number

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        return real(*arguments, **options) if left else die()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        killed(work)


def run_verbatim(line: str | None, directory: Path) -> None:
    """What a user does with a command that is printed: he copies it, from wherever he is."""
    assert line is not None
    program, _, words = line.partition(" ")
    assert program == "chainmerge"
    subprocess.run(
        ["bash", "-c", f"{shlex.join(COMMAND)} {words}"],
        check=True,
        cwd=directory,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
