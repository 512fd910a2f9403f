# SPDX-License-Identifier: Apache-2.0
"""The process that merges, for a worker that may die before it.

It writes to a file and not to a pipe, so that its report survives the worker, and nobody who does
not read holds it up. It inherits a lock, which is free once it has ended, whoever is left to see
that: no second process is started for a job before.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import sys
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence


_BETWEEN_LOOKS: Final = 0.1
_LARGEST_PROGRESS: Final = 16 << 10
_LARGEST_REPORT: Final = 16 << 20


class JobFiles(Struct, frozen=True):
    """What a job leaves on its host while it is not over."""

    spool: Path
    lock: Path
    plan: Path

    def remove(self) -> None:
        """Remove them, once the database has the report."""
        for file in (self.spool, self.lock, self.plan):
            # Whatever keeps them there, the job has ended.
            with suppress(OSError):
                file.unlink()

    def exist(self) -> bool:
        """Whether a child has been started for it."""
        return self.spool.exists()

    def plan_digest(self) -> str:
        """That of the plan with which a child was first started; empty if none was."""
        try:
            return self.plan.read_text(encoding="ascii")
        except OSError:
            return ""

    def keep_plan_digest(self, digest: str) -> None:
        """Keep it, so that what a child does that is interrupted is not taken for somebody else's.

        Raises OSError.
        """
        if not self.plan_digest():
            self.plan.write_text(digest, encoding="ascii")

    def lines(self) -> list[str]:
        """The last that the job's child has written, its report among it."""
        return self._end(_LARGEST_REPORT).decode("utf-8", "replace").splitlines()

    def newest_line(self) -> str:
        """The last whole line, or nothing."""
        whole, _, _ = self._end(_LARGEST_PROGRESS).rpartition(b"\n")
        return whole.rpartition(b"\n")[2].decode("utf-8", "replace")

    def _end(self, size: int) -> bytes:
        """The last bytes of the spool file, which grows as long as a merge takes."""
        try:
            with self.spool.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - size))
                return file.read()
        except OSError:
            return b""


def files_of(state: Path, job: int, label: str) -> JobFiles:
    """Where those of a job are.

    The label tells it from another job of the same number: a database that comes from a backup
    gives numbers again.
    """
    name = f"{job}-{label[:8]}"
    return JobFiles(state / f"{name}.jsonl", state / f"{name}.lock", state / f"{name}.plan")


@asynccontextmanager
async def held(lock: Path) -> AsyncIterator[int]:
    """Give the descriptor of a lock, once no child of an earlier worker has it any more."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while not _try_lock(descriptor):
            await asyncio.sleep(_BETWEEN_LOOKS)
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Child:
    """A process of the program that merges."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def started(cls, words: Sequence[str], spool: Path, lock: int) -> Child:
        """Start one that writes over *spool* and holds *lock*.

        It is to be called from the thread that lives as long as the worker: the death of that
        thread is what the kernel tells the child.
        """
        with spool.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *_command(words),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                start_new_session=True,
                pass_fds=(lock,),
            )
        return cls(process)

    def stop(self) -> None:
        """Ask it to stop at the next safe point."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    async def ended(self) -> int:
        """Return its exit status, negative if a signal ended it."""
        return await self._process.wait()


class Printed(Struct, frozen=True):
    """What a child has printed that only reads, and its exit status."""

    text: bytes
    status: int


async def printed_by(words: Sequence[str], lock: int) -> Printed:
    """Have a child print something that only reads."""
    return await _printed(_command(words), lock)


async def domains_here(uri: str) -> frozenset[str] | None:
    """Return the UUIDs of the domains that run on this host; None if libvirt does not say.

    Where *uri* is empty there is no libvirt, and no domain.
    """
    if not uri:
        return frozenset()
    printed = await _printed(_command([uri], "chainmerge.fleet.whereabouts"))
    if printed.status != 0:
        return None
    return msgspec.json.decode(printed.text, type=frozenset[str])


async def _printed(command: Sequence[str], *kept_open: int) -> Printed:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
        pass_fds=kept_open,
    )
    text, _ = await process.communicate()
    return Printed(text, await process.wait())


def _command(words: Sequence[str], module: str = "chainmerge") -> list[str]:
    # What sets the signal in a process of its own is better than code of ours between fork and
    # exec in a program that has threads.
    program = [sys.executable, "-m", module]
    return ["setpriv", "--pdeathsig", "TERM", "--", *program, *words]
