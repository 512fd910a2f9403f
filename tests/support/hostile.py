# SPDX-License-Identifier: Apache-2.0
"""A small chain to be damaged, and every command that is then let loose on it."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from chainmerge.cli.main import run
from chainmerge.errors import ExitCode
from tests.chain.unchanged import unchanged
from tests.support import qemu
from tests.support.cli import Ran
from tests.support.images import KIB, Write, WriteCompressed, WriteZeroes, apply_writes

if TYPE_CHECKING:
    from collections.abc import Iterator

DISK: Final = 1024 * KIB
CLUSTER: Final = 4 * KIB

# Nobody here lets go of a lock while we wait.
NO_WAITING: Final = ("--lock-wait", "0")
LOOKING: Final = (
    ("measure",),
    ("info",),
    ("check",),
    ("bitmaps", "list"),
    ("repair", "--dry-run"),
    ("plan",),
    ("plan", "--json"),
)


@dataclass(frozen=True)
class Victim:
    """A chain ``root <- base <- top`` with data, zeros, compressed clusters and bitmaps."""

    directory: Path

    @property
    def root(self) -> Path:
        return self.directory / "root.qcow2"

    @property
    def base(self) -> Path:
        return self.directory / "base.qcow2"

    @property
    def top(self) -> Path:
        return self.directory / "top.qcow2"

    def image(self, role: str) -> Path:
        return self.directory / f"{role}.qcow2"

    def copy_to(self, directory: Path) -> Victim:
        shutil.copytree(self.directory, directory)
        return Victim(directory)


def build(directory: Path) -> Victim:
    directory.mkdir()
    victim = Victim(directory)
    backing: str | None = None
    for number, path in enumerate((victim.root, victim.base, victim.top)):
        qemu.create(path, DISK, backing=backing, cluster_size=CLUSTER)
        for name in ("both", "more"):
            qemu.qemu_img("bitmap", "--add", "-g", "512", path, name)
        # Each has something that only it has, and something that the next one hides.
        start = number * 128 * KIB
        writes = (
            WriteCompressed(start, 32 * KIB),
            Write(start + 64 * KIB, 84 * KIB),
            WriteZeroes(start + 512 * KIB, 64 * KIB),
        )
        apply_writes(path, writes)
        backing = path.name
    for pattern in directory.glob("pattern-*"):
        pattern.unlink()
    return victim


def chainmerge(*arguments: str | Path) -> Ran:
    """Run a command in this process; as a process of its own it would take ten times as long."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run([os.fspath(argument) for argument in arguments])
    return Ran(status, _text(out), _text(err))


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode("utf-8", "surrogateescape")


def commands(image: Path) -> Iterator[tuple[str, ...]]:
    """Every command that looks at an image, and the one that merges it, which comes last."""
    for command in (*LOOKING, ("merge",)):
        yield (*command, *NO_WAITING, os.fspath(image))


def assert_civil(ran: Ran) -> None:
    """Whatever happened, it was said in words that are safe to show, with what to do about it."""
    said = ran.out + ran.err
    assert "Traceback" not in said, said
    assert "internal-error" not in said, said
    assert all(letter.isprintable() or letter == "\n" for letter in said), said
    assert ran.status in (ExitCode.DONE, ExitCode.FAILED, ExitCode.USAGE, ExitCode.REFUSED), said
    if ran.status in (ExitCode.USAGE, ExitCode.REFUSED):
        assert any(words in said for words in ("what to do: ", '"hint"', "Refused\n")), said


def assert_refuses(
    directory: Path,
    top: Path,
    *codes: str,
    options: tuple[str | Path, ...] = (),
    status: int = ExitCode.REFUSED,
) -> str:
    """No command changes anything, and those that merge refuse, for one of the reasons *codes*.

    Returns what the merge said.
    """
    with unchanged(directory):
        for command in commands(top):
            ran = chainmerge(*command, *options)
            assert_civil(ran)
            if command[0] in ("plan", "merge"):
                assert ran.status == status, (command, ran)
                assert any(code in ran.out + ran.err for code in codes), (codes, command, ran)
    return ran.err
