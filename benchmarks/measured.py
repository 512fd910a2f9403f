# SPDX-License-Identifier: Apache-2.0
"""Runs one command and prints what it took: status, seconds, bytes of memory, CPU seconds.

A program of its own, and a small one: a process begins with the peak memory of the one that
started it, and whoever prepares images is larger than what is to be measured.
"""

from __future__ import annotations

import os
import sys
import time

_KIB = 1024


def main() -> int:
    command = sys.argv[1:]
    silent = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    started = time.monotonic()
    child = os.posix_spawnp(command[0], command, os.environ, file_actions=silent)
    # wait4 counts this process and those that it waited for itself, and no others.
    _, status, usage = os.wait4(child, 0)
    seconds = time.monotonic() - started
    cpu = usage.ru_utime + usage.ru_stime
    print(os.waitstatus_to_exitcode(status), seconds, usage.ru_maxrss * _KIB, cpu)
    return 0


if __name__ == "__main__":
    sys.exit(main())
