# SPDX-License-Identifier: Apache-2.0
"""A process that has chainmerge loaded, and merges when told to, as a manager of VMs would."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Self

from benchmarks.harness import ENVIRONMENT, CommandFailed, Run

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

_KIB = 1024


class Resident:
    """The process, as the benchmarks see it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            (sys.executable, "-m", "benchmarks.resident"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=ENVIRONMENT,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.communicate()

    def merge(self, top: Path, allowed: Path, **options: str) -> Run:
        """Merge *top* there, with a base in the directory *allowed*; return what that took.

        Raises:
            CommandFailed: the merge did not work.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps([str(top), str(allowed), options])}\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if isinstance(answer, str):
            raise CommandFailed(answer)
        return Run(*answer)


def main() -> int:
    for line in sys.stdin:
        print(json.dumps(_merge(*json.loads(line))), flush=True)
    return 0


def _merge(top: str, allowed: str, options: Mapping[str, Any]) -> tuple[float, int, float] | str:
    import chainmerge  # noqa: PLC0415 (only in the process that merges)
    from chainmerge.errors import ChainmergeError  # noqa: PLC0415
    from chainmerge.options import Access, MergeOptions  # noqa: PLC0415

    started, cpu = time.monotonic(), time.process_time()
    try:
        chainmerge.merge(top, None, Access(allow_backing=(allowed,)), MergeOptions(**options))
    except ChainmergeError as error:
        return str(error)
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB
    return seconds, memory, cpu


if __name__ == "__main__":
    sys.exit(main())
