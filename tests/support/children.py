# SPDX-License-Identifier: Apache-2.0
"""Work that is done in a child, so that it can be killed."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def is_killed(work: Callable[[], object]) -> bool:
    """Do the work in a child; whether that was killed."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            work()
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
