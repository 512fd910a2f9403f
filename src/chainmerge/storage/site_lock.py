# SPDX-License-Identifier: Apache-2.0
"""The command by which a site locks volumes for one of its hosts."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import tempfile
from typing import TYPE_CHECKING, Final

from chainmerge.errors import ChainmergeError
from chainmerge.storage.errors import reason_of
from chainmerge.storage.lvm_process import in_one_line
from chainmerge.storage.volume_errors import VolumeNotGivenBack, VolumeNotGranted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_MESSAGE_BYTES: Final = 4096


@contextlib.contextmanager
def locked_by_site(
    command: str, volumes: Sequence[str], goes_on: Callable[[], bool]
) -> Iterator[None]:
    """Have *volumes* locked for this host by *command* in the block.

    They stay locked if the block ends with an error of what may go on, with any other one while
    *goes_on*, or with a kill: something that was begun may still write to them then. Whoever
    finishes it locks them again.

    Raises:
        VolumeNotGranted: they are not locked.
        VolumeNotGivenBack: they stay locked, although the block has ended well.
    """
    shown = ", ".join(volumes)
    refused = _why_not(command, "lock", volumes)
    if refused is not None:
        raise VolumeNotGranted(shown, command, refused)
    try:
        yield
    except BaseException as error:
        # What went wrong in the block is what has to be told.
        if not (isinstance(error, ChainmergeError) and error.may_go_on) and not goes_on():
            _why_not(command, "unlock", volumes)
        raise
    kept = _why_not(command, "unlock", volumes)
    if kept is not None:
        raise VolumeNotGivenBack(shown, command, kept)


def _why_not(command: str, action: str, volumes: Sequence[str]) -> str | None:
    """Run the command; why it did not do what it was to, in words; None if it did."""
    argv = [*shlex.split(command), action, *volumes]
    # A file, not a pipe: what the command leaves running, to hold the lock, may keep it open.
    with tempfile.TemporaryFile() as messages:
        try:
            status = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=messages,
                stderr=messages,
                check=False,
                # A Ctrl-C on the terminal is for us, not for a lock that is being given back.
                start_new_session=True,
            ).returncode
        except OSError as error:
            return f"it cannot be run: {reason_of(error)}"
        if status == 0:
            return None
        messages.seek(0)
        return f"it exited with status {status}: {in_one_line(messages.read(_MESSAGE_BYTES))}"
