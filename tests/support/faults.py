# SPDX-License-Identifier: Apache-2.0
"""Calls of the operating system that fail, one by one.

An operation runs in a child, in which the functions of :mod:`os` (and the others that we use)
are counted where they touch files of a directory or a device. Call number *n* of one of them
fails: with an error, or by doing only a part of what it was asked for, as it may.

A flush that fails loses what was written since the last one that did not: Linux marks the pages
clean, so that they show the new content until they are dropped, and the old one then. What
became of them is for whoever looks at the images next: :class:`Lost`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import pickle
import signal
import tempfile
import threading
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from chainmerge.errors import ChainmergeError
from chainmerge.storage import allocation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

PAGE: Final = 4096
SHORT: Final = 0
"""Instead of an error: no more than a part is done."""
SECONDS: Final = 120

_OF_WRITES: Final = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR, SHORT)
_OF_NAMES: Final = (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EACCES)
_OF_SPACE: Final = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR)
ERRORS: Final[Mapping[str, tuple[int, ...]]] = {
    "open": (errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EACCES, errno.EINTR),
    "stat": (errno.EIO, errno.ENOMEM),
    "fstat": (errno.EIO,),
    "lseek": (errno.EIO,),
    "pread": (errno.EIO, errno.EINTR, SHORT),
    "preadv": (errno.EIO, errno.EINTR, SHORT),
    "read": (errno.EIO, errno.EINTR, SHORT),
    "pwrite": _OF_WRITES,
    "pwritev": _OF_WRITES,
    "write": _OF_WRITES,
    "fsync": (errno.EIO, errno.ENOSPC, errno.EDQUOT),
    "fdatasync": (errno.EIO, errno.ENOSPC, errno.EDQUOT),
    "ftruncate": _OF_SPACE,
    "fallocate": (*_OF_SPACE, errno.EOPNOTSUPP),
    "ioctl": (*_OF_SPACE, errno.EOPNOTSUPP),
    "copy_file_range": _OF_SPACE,
    "posix_fadvise": (errno.EIO,),
    "rename": _OF_NAMES,
    "replace": _OF_NAMES,
    "unlink": _OF_NAMES,
    "mkdir": _OF_NAMES,
    "fchmod": (errno.EIO, errno.EPERM),
}
"""What each function can fail with."""


@dataclass(frozen=True)
class Fault:
    """Call *number* (from 0) of *function* fails with *error*, or comes up :data:`SHORT`."""

    function: str
    number: int
    error: int

    def __str__(self) -> str:
        how = "short" if self.error == SHORT else errno.errorcode[self.error]
        return f"{self.function} {self.number}: {how}"


def faults_of(calls: Mapping[str, int]) -> list[Fault]:
    """Every fault that an operation can meet which calls each function so many times."""
    return [
        Fault(function, number, error)
        for function, count in sorted(calls.items())
        for number in range(count)
        for error in ERRORS[function]
    ]


@dataclass
class Lost:
    """Pages by file and offset, with what the disk has there instead of what was written."""

    pages: dict[tuple[str, int], bytes] = field(default_factory=dict)

    def drop(self, path: str | None = None) -> None:
        """Have the pages read from the disk again, those of one file or all."""
        for file, offset in [key for key in self.pages if path in (None, key[0])]:
            old = self.pages.pop((file, offset))
            if Path(file).exists():
                fd = os.open(file, os.O_WRONLY)
                # A file that was cut in the meantime has no such page any more.
                room = os.lseek(fd, 0, os.SEEK_END) - offset
                os.pwrite(fd, old[: max(0, room)], offset)
                os.close(fd)


@dataclass(frozen=True)
class Run:
    """How an operation ended in the child.

    Attributes:
        calls: How often each function was called on what is watched.
        injected: Whether the fault came about.
        error: The code of the error that it raised; "" for none.
        exit_code: Of the command line, in that case.
        bug: The traceback of an error that is none of ours; "" for none.
        lost: What a flush that failed has lost.
    """

    calls: dict[str, int]
    injected: bool
    error: str
    exit_code: int
    bug: str
    lost: Lost


def run_with(
    fault: Fault | None,
    places: Sequence[Path],
    operation: Callable[[], object],
    lost: Lost | None = None,
) -> Run:
    """Run *operation* in a child, in which *fault* strikes what is one of *places*, or below it.

    *lost* is what an earlier run has lost; it shows as soon as the pages are dropped.
    """
    with tempfile.TemporaryFile() as report:
        child = os.fork()
        if child == 0:
            _act(fault, places, operation, lost or Lost(), report.fileno())
        _, status = os.waitpid(child, 0)
        report.seek(0)
        assert status == 0, f"{fault}: the child ended with wait status {status:#x}"
        run = pickle.load(report)
    assert isinstance(run, Run)
    return run


def _act(
    fault: Fault | None,
    places: Sequence[Path],
    operation: Callable[[], object],
    lost: Lost,
    report: int,
) -> NoReturn:
    try:
        signal.alarm(SECONDS)
        saboteur = _Saboteur(fault, places, lost)
        error, exit_code, bug = "", 0, ""
        try:
            with saboteur.at_work():
                operation()
        except ChainmergeError as failure:
            error, exit_code = failure.code, int(failure.exit_code)
            if not (failure.sentence and failure.advice):
                bug = f"{failure!r} has nothing to say"
        except BaseException:
            bug = traceback.format_exc()
        run = Run(dict(saboteur.calls), saboteur.injected, error, exit_code, bug, lost)
        with os.fdopen(os.dup(report), "wb") as file:
            pickle.dump(run, file)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


class _Saboteur:
    """Stands in for the functions, counts their calls, and spoils one of them."""

    def __init__(self, fault: Fault | None, places: Sequence[Path], lost: Lost) -> None:
        self.calls: Counter[str] = Counter()
        self.injected = False
        self._fault = fault
        self._places = [os.path.realpath(place) for place in places]
        self._lost = lost
        # Of files with unflushed writes: what the disk has in these pages.
        self._unflushed: dict[tuple[str, int], bytes] = {}
        self._lock = threading.RLock()
        self._real = {name: getattr(os, name) for name in ERRORS if hasattr(os, name)}
        self._real["ioctl"] = fcntl.ioctl
        self._real["fallocate"] = allocation._LIBC.fallocate

    def at_work(self) -> _AtWork:
        return _AtWork(self, self._real)

    def stand_in_for(self, name: str) -> Callable[..., Any]:
        real = self._real[name]

        def stand_in(*arguments: Any, **options: Any) -> Any:
            path = self._watched(arguments[0] if arguments else None)
            if path is None:
                return real(*arguments, **options)
            with self._lock:
                strikes = self._strikes(name)
                if strikes and self._fault is not None and self._fault.error != SHORT:
                    return self._fail(name, path, self._fault.error)
            if strikes:
                arguments = _shortened(name, arguments)
            return self._call(name, path, arguments, options)

        return stand_in

    def _watched(self, target: Any) -> str | None:
        """The path of what is watched; None for everything else."""
        if isinstance(target, int):
            try:
                path = os.readlink(f"/proc/self/fd/{target}")  # noqa: PTH115
            except OSError:
                return None
        elif isinstance(target, str | os.PathLike):
            path = os.path.abspath(os.fspath(target))  # noqa: PTH100
            if path.startswith("/proc/self/fd/"):
                return self._watched(int(path.rpartition("/")[2]))
        else:
            return None
        inside = (path == place or path.startswith(f"{place}/") for place in self._places)
        return path if any(inside) else None

    def _strikes(self, name: str) -> bool:
        number = self.calls[name]
        self.calls[name] += 1
        fault = self._fault
        if fault is None or (fault.function, fault.number) != (name, number):
            return False
        self.injected = True
        return True

    def _fail(self, name: str, path: str, error: int) -> int:
        if name in ("fsync", "fdatasync"):
            for key in [key for key in self._unflushed if key[0] == path]:
                self._lost.pages[key] = self._unflushed.pop(key)
        if name == "fallocate":
            ctypes.set_errno(error)
            return -1
        raise OSError(error, os.strerror(error), path)

    def _call(
        self, name: str, path: str, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        real = self._real[name]
        if name in ("pwrite", "pwritev") and ".chainmerge-" not in path:
            with self._lock:
                self._note_write(path, arguments)
                return real(*arguments, **options)
        result = real(*arguments, **options)
        with self._lock:
            if name in ("fsync", "fdatasync"):
                for key in [key for key in self._unflushed if key[0] == path]:
                    del self._unflushed[key]
            if name == "posix_fadvise" and arguments[3] == os.POSIX_FADV_DONTNEED:
                self._without_stand_ins(lambda: self._lost.drop(path))
            if name in ("rename", "replace"):
                self._follow(path, os.path.abspath(arguments[1]))  # noqa: PTH100
        return result

    def _note_write(self, path: str, arguments: tuple[Any, ...]) -> None:
        data, offset = arguments[1], arguments[2]
        length = sum(len(part) for part in data) if isinstance(data, list) else len(data)
        fd = self._real["open"](path, os.O_RDONLY)
        for page in range(offset // PAGE * PAGE, offset + length, PAGE):
            key = (path, page)
            # A page that was lost and is written again is dirty again, as a whole.
            old = self._lost.pages.pop(key, None)
            if old is None:
                old = self._real["pread"](fd, PAGE, page).ljust(PAGE, b"\0")
            self._unflushed.setdefault(key, old)
        os.close(fd)

    def _follow(self, old: str, new: str) -> None:
        for pages in (self._unflushed, self._lost.pages):
            for key in [key for key in pages if key[0] in (old, new)]:
                content = pages.pop(key)
                if key[0] == old:
                    pages[new, key[1]] = content

    def _without_stand_ins(self, action: Callable[[], None]) -> None:
        with _Restored(self._real):
            action()


class _AtWork:
    """The stand-ins are called instead of the functions."""

    def __init__(self, saboteur: _Saboteur, real: Mapping[str, Any]) -> None:
        self._saboteur = saboteur
        self._real = real

    def __enter__(self) -> None:
        _install({name: self._saboteur.stand_in_for(name) for name in self._real})

    def __exit__(self, *_exception: object) -> None:
        _install(self._real)


class _Restored:
    """For a moment, the functions are what they are."""

    def __init__(self, real: Mapping[str, Any]) -> None:
        self._real = real

    def __enter__(self) -> None:
        self._instead = {name: _installed(name) for name in self._real}
        _install(self._real)

    def __exit__(self, *_exception: object) -> None:
        _install(self._instead)


def _installed(name: str) -> Any:
    if name == "ioctl":
        return fcntl.ioctl
    return allocation._LIBC.fallocate if name == "fallocate" else getattr(os, name)


def _install(functions: Mapping[str, Any]) -> None:
    for name, function in functions.items():
        if name == "ioctl":
            fcntl.ioctl = function
        elif name == "fallocate":
            allocation._LIBC.fallocate = function  # type: ignore[attr-defined]
        else:
            setattr(os, name, function)


def _shortened(name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """A request for a part of what is asked for, and never for nothing."""
    first, wanted, *rest = arguments
    match name:
        case "pread" | "read":
            return (first, max(1, wanted // 3), *rest)
        case "preadv" | "pwritev":
            view = wanted[0]
            # Direct I/O does whole sectors.
            part = max(min(len(view), 512), len(view) // 3 // PAGE * PAGE)
            return (first, [view[:part]], *rest)
        case _:
            return (first, bytes(wanted)[: max(1, len(wanted) // 3)], *rest)
