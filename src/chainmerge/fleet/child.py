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

from msgspec import Struct

from chainmerge.records.request import RecordedRequest, arguments_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from chainmerge.fleet.record import JobRecord
    from chainmerge.fleet.settings import HostSettings

_BETWEEN_LOOKS: Final = 0.1
_LARGEST_PROGRESS: Final = 16 << 10
_LARGEST_REPORT: Final = 16 << 20
_ACCESS_OPTIONS: Final = frozenset({"sole_user"})


class JobFiles(Struct, frozen=True):
    """What a job leaves on its host while it is not over."""

    spool: Path
    lock: Path

    def remove(self) -> None:
        """Remove them, once the database has the report."""
        for file in (self.spool, self.lock):
            file.unlink(missing_ok=True)

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
    return JobFiles(state / f"{job}-{label[:8]}.jsonl", state / f"{job}-{label[:8]}.lock")


def merge_words(record: JobRecord, host: HostSettings) -> list[str]:
    """The arguments of ``chainmerge`` that do what a record asks for."""
    command, *rest = _arguments(record, host)
    return [command, "--json", *rest]


def plan_words(record: JobRecord, host: HostSettings) -> list[str]:
    """The arguments of ``chainmerge`` that plan it again."""
    command, *rest = _arguments(record, host)
    return [command, "--dry-run", "--json", *rest]


def look_words(host: HostSettings) -> list[str]:
    """The arguments of ``chainmerge`` that look at this host, and store what is found."""
    return ["fleet", "look", "--store", "--json", "--quiet", "--config", host.file]


def _arguments(record: JobRecord, host: HostSettings) -> list[str]:
    usual = type(record.options)()
    asked = {
        name: value
        for name in record.options.__struct_fields__
        if (value := getattr(record.options, name)) != getattr(usual, name)
    }
    access = {name: asked.pop(name) for name in _ACCESS_OPTIONS & asked.keys()}
    if host.fleet.lock_command:
        access["lock_command"] = host.fleet.lock_command
    request = RecordedRequest(
        tops=[disk.top for disk in record.disks],
        bases=[disk.base for disk in record.disks],
        access=access,
        options=asked,
    )
    arguments = arguments_of(request)
    assert arguments is not None
    return arguments


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


async def output_of(words: Sequence[str], lock: int) -> bytes:
    """Return what a child prints that only reads."""
    process = await asyncio.create_subprocess_exec(
        *_command(words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
        pass_fds=(lock,),
    )
    printed, _ = await process.communicate()
    return printed


def _command(words: Sequence[str]) -> list[str]:
    # What sets the signal in a process of its own is better than code of ours between fork and
    # exec in a program that has threads.
    program = [sys.executable, "-m", "chainmerge"]
    return ["setpriv", "--pdeathsig", "TERM", "--", *program, *words]
