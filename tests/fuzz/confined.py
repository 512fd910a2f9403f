# SPDX-License-Identifier: Apache-2.0
"""Commands in a child that may use little memory and time, and open nothing but what is there."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from chainmerge.chain.surroundings import Surroundings
from chainmerge.records import files as state_files
from chainmerge.storage import bystanders
from chainmerge.storage.files import FileReadable
from tests.support.hostile import chainmerge

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Beyond what the parent has: sixteen threads of the crew, their stacks and their buffers.
MEMORY_BYTES: Final = 1 << 30
CPU_SECONDS: Final = 30
WALL_SECONDS: Final = 600
LONGEST_READ: Final = 64 << 20
_ROOM_FOR_REPORTS: Final = 64 << 20

_PROGRAM: Final = tuple(
    os.path.realpath(place)
    for place in (
        Path(__file__).parents[2],
        sys.prefix,
        sys.base_prefix,
        sysconfig.get_path("stdlib"),
        "/usr/share",
        "/usr/lib",
        "/proc",
        "/sys",
        "/dev/null",
    )
)


@dataclass(frozen=True)
class Ended:
    """How a command ended. *status* is None where it was killed, and *err* says by what."""

    command: tuple[str, ...]
    status: int | None
    out: str
    err: str


@dataclass(frozen=True)
class Outcome:
    """What the child did: the commands up to the first that was killed, and what is forbidden."""

    ended: tuple[Ended, ...]
    offences: tuple[str, ...]


def run_confined(directory: Path, commands: Sequence[tuple[str, ...]]) -> Outcome:
    """Run *commands*, one after the other, on the images in *directory*."""
    with tempfile.TemporaryFile() as report:
        child = os.fork()
        if child == 0:
            _be_confined(directory, commands, report.fileno())
        status = _wait(child)
        report.seek(0)
        lines = [json.loads(line) for line in report.read().splitlines()]
    offences = [line["offence"] for line in lines if "offence" in line]
    ended = [Ended(**line) for line in lines if "status" in line]
    ended = [Ended(tuple(one.command), one.status, one.out, one.err) for one in ended]
    if len(ended) < len(commands):
        killer = f"ended by signal {status}" if status > 0 else f"exited with {-status}"
        ended.append(Ended(commands[len(ended)], None, "", killer))
    return Outcome(tuple(ended), tuple(offences))


def _wait(child: int) -> int:
    """The number of the signal that ended the child, or its exit status, negated."""
    deadline = time.monotonic() + WALL_SECONDS
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


def _be_confined(directory: Path, commands: Sequence[tuple[str, ...]], report: int) -> NoReturn:
    try:
        # What others on this machine do with their devices is no business of this case.
        state_files.STATE_DIRECTORY = directory / "state"  # type: ignore[misc]
        # Nor are files that lie further away: they are looked at whatever an image names.
        Surroundings.around = lambda _self: iter(())  # type: ignore[assignment,method-assign]
        bystanders._loop_devices = dict
        _watch_opens(directory, report)
        watch_reads(lambda what: _write(report, offence=f"{what} by {_callers()}"))
        _limit()
        for command in commands:
            ran = chainmerge(*command)
            _write(report, command=command, status=ran.status, out=ran.out[-4000:], err=ran.err)
        os._exit(0)
    except BaseException as error:  # (whatever a command lets through is what is looked for)
        _write(report, offence=f"escaped: {type(error).__name__}: {error}: {_callers()}")
        os._exit(1)


def _callers() -> str:
    frames = traceback.extract_stack()[:-2]
    ours = [frame for frame in frames if "/chainmerge/" in frame.filename][-6:]
    return " > ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in ours)


def _write(report: int, **line: Any) -> None:
    os.write(report, json.dumps(line).encode() + b"\n")


def _limit() -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    memory = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_ROOM_FOR_REPORTS, _ROOM_FOR_REPORTS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _watch_opens(directory: Path, report: int) -> None:
    allowed = (*_PROGRAM, os.path.realpath(directory))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path = arguments[0]
            if isinstance(path, int):
                return
            real = os.path.realpath(path)
            if not any(real == place or real.startswith(f"{place}{os.sep}") for place in allowed):
                _write(report, offence=f"opened {os.fsdecode(path)!r}")
        elif event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect"):
            _write(report, offence=f"{event} {arguments!r}")

    sys.addaudithook(hook)


def watch_reads(complain: Callable[[str], None]) -> None:
    """Say so of reads that are not of what the file has, or longer than any table may be."""
    read = FileReadable._pread

    def watched(self: FileReadable, offset: int, length: int) -> bytes:
        end = os.fstat(self.fd).st_size
        if length > LONGEST_READ or offset > end + (2 << 20):
            complain(f"{length} bytes read at {offset} of {end}")
        return read(self, offset, length)

    FileReadable._pread = watched  # type: ignore[method-assign]
