# SPDX-License-Identifier: Apache-2.0
"""What QEMU can read of a chain: for images whose content only QEMU can read.

The storage daemon opens all images for reading, with their keys, and hands base's content and
top's to ``qemu-img compare``, which neither sees the files nor the keys.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from chainmerge.engines.qemu.daemon import StorageDaemon
from chainmerge.engines.qemu.errors import (
    CommandRefused,
    ConnectionLost,
    DaemonFailed,
    DaemonMissing,
    ImageNotOpened,
)
from chainmerge.engines.qemu.nodes import (
    ImageSpec,
    NodeChain,
    node_name,
    open_nodes,
    speakable_names,
)
from chainmerge.errors import Interrupted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

QEMU_IMG: Final = "qemu-img"
_SECONDS_BETWEEN_QUESTIONS: Final = 0.25
_DIFFERENT: Final = 1
_AT_OFFSET: Final = re.compile(r"mismatch at offset (\d+)")
_STOPPED: Final = "the comparison was stopped; it changes nothing"


def require_openable(images: Sequence[ImageSpec]) -> None:
    """Have QEMU open a chain for reading, which shows whether its keys are the right ones.

    Raises:
        ImageNotOpened: QEMU cannot, for the reason that it gives.
        DaemonMissing: qemu-storage-daemon or qemu-img is not installed.
    """
    _program()
    with _opened(images):
        pass


def content_difference(
    images: Sequence[ImageSpec], base_index: int, size: int, should_stop: Callable[[], bool]
) -> str | None:
    """Compare the first *size* bytes of what base shows with what top shows.

    Args:
        images: The chain from its root to top; nobody writes to any of them.
        base_index: Position of base in *images*.
        size: Bytes; base's disk has at least so many, and top's has just so many.
        should_stop: Asked a few times a second.

    Returns:
        QEMU's words for the first difference; None if there is none.

    Raises:
        Interrupted: *should_stop* said yes.
        ImageNotOpened: QEMU cannot read an image.
        DaemonMissing: qemu-storage-daemon or qemu-img is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="chainmerge-") as directory:
        socket = Path(directory) / "nbd"
        with _opened(images) as daemon:
            _export(daemon, socket, base_index, len(images) - 1)
            return _compared(images[-1].path, size, socket, should_stop)


@contextlib.contextmanager
def _opened(images: Sequence[ImageSpec]) -> Iterator[StorageDaemon]:
    """A daemon that has a chain open for reading; whatever it fails with is ImageNotOpened."""
    with speakable_names(images) as names:
        try:
            with StorageDaemon(names.descriptors) as daemon:
                open_nodes(daemon, NodeChain(images, None, names))
                yield daemon
        except (CommandRefused, ConnectionLost, DaemonFailed) as error:
            raise ImageNotOpened(images[-1].path, names.in_message(error.reason)) from error


def _program() -> str:
    program = shutil.which(QEMU_IMG)
    if program is None:
        raise DaemonMissing(QEMU_IMG)
    return program


def _export(daemon: StorageDaemon, socket: Path, base: int, top: int) -> None:
    address = {"type": "unix", "data": {"path": str(socket)}}
    daemon.execute("nbd-server-start", {"addr": address, "max-connections": 2})
    for name, index in (("base", base), ("top", top)):
        # Without a node above it, of which QEMU would not see what comes from backing files.
        export = {"type": "nbd", "id": name, "name": name, "node-name": node_name(index)}
        daemon.execute("block-export-add", export)


def _compared(top: str, size: int, socket: Path, should_stop: Callable[[], bool]) -> str | None:
    exports = [f"nbd+unix:///{name}?socket={quote(str(socket))}" for name in ("base", "top")]
    process = subprocess.Popen(
        [_program(), "compare", "-f", "raw", "-F", "raw", *exports],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    with process:
        try:
            while True:
                try:
                    said, complaints = process.communicate(timeout=_SECONDS_BETWEEN_QUESTIONS)
                    break
                except subprocess.TimeoutExpired:
                    if should_stop():
                        raise Interrupted(_STOPPED) from None
        finally:
            process.kill()
    if process.returncode == 0:
        return None
    if process.returncode == _DIFFERENT:
        # Base's disk may be longer than top's. The rest of it comes last.
        found = _AT_OFFSET.search(said)
        return None if found and int(found[1]) >= size else said.strip()
    raise ImageNotOpened(top, complaints.strip())
