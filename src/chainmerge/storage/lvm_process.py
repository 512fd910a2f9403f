# SPDX-License-Identifier: Apache-2.0
"""One ``lvm`` command, run to its end."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from typing import TYPE_CHECKING, BinaryIO, Final

from chainmerge.storage.errors import reason_of
from chainmerge.storage.volume_errors import LvmFailed, LvmMissing, LvmUnfinished

if TYPE_CHECKING:
    from collections.abc import Sequence

_PROGRAM: Final = "lvm"

# LVM waits for the locks of other lvm commands, which may take their time.
_TIMEOUT_SECONDS: Final = 300.0
_GRACE_SECONDS: Final = 30.0
_MESSAGE_BYTES: Final = 4096


def run_lvm(image: str, command: str, *arguments: str) -> str:
    """Run one lvm command on behalf of *image*, and return its standard output.

    Raises:
        LvmMissing, LvmFailed
        LvmUnfinished: it goes on, and nobody knows what it will have done.
    """
    program = shutil.which(_PROGRAM)
    if program is None:
        raise LvmMissing(image, "it is not on PATH")
    # Files, not pipes: a command that we stop waiting for can still write to them.
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as messages:
        process = _start(image, [program, command, *arguments], output, messages)
        status = _wait(image, command, process)
        output.seek(0)
        messages.seek(0)
        if status != 0:
            reason = in_one_line(messages.read(_MESSAGE_BYTES))
            raise LvmFailed(image, f"{_PROGRAM} {command}", status, reason)
        return output.read().decode(errors="replace")


def _start(
    image: str, argv: Sequence[str], output: BinaryIO, messages: BinaryIO
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=messages,
            env={**os.environ, "LC_ALL": "C"},
            # A Ctrl-C on the terminal is for us, not for LVM in the middle of a change.
            start_new_session=True,
        )
    except OSError as error:
        raise LvmMissing(image, reason_of(error)) from error


def _wait(image: str, command: str, process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        # LVM ends on SIGTERM where it can; by SIGKILL it could leave a device suspended.
        process.terminate()
    try:
        return process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired as error:
        waited = _TIMEOUT_SECONDS + _GRACE_SECONDS
        raise LvmUnfinished(image, f"{_PROGRAM} {command}", process.pid, waited) from error


def in_one_line(messages: bytes) -> str:
    """What a command has said, as the end of a sentence."""
    lines = messages.decode(errors="replace").splitlines()
    said = "; ".join(line.strip() for line in lines if line.strip())
    return said or "it did not say why"
