# SPDX-License-Identifier: Apache-2.0
"""A disk of a VM at which something dies at a chosen call: the merge, or the VM.

As a program it is a manager that kills itself:
``python -m tests.support.dying SOCKET DEVICE TOP BASE CALL before|after COUNT-FILE commit|pull``.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from chainmerge import live
from chainmerge.options import LiveOptions

Moment = Literal["before", "after"]
MOMENTS: Final[dict[str, Moment]] = {"before": "before", "after": "after"}


def random_moments(count: int, seed: int, latest_call: int) -> list[tuple[int, Moment]]:
    """Calls before *latest_call*, and whether to die before or after each."""
    random_ = random.Random(seed)
    sides: tuple[Moment, Moment] = ("before", "after")
    return [(random_.randrange(1, latest_call), random_.choice(sides)) for _ in range(count)]


@dataclass
class DyingVm:
    """Passes calls on to *vm*; *die* is called before or after one of them.

    It is the one with the number *call*, or the first one of that name. *numbers* counts the calls;
    several disks may share it.
    """

    vm: Any
    call: int
    moment: Moment
    die: Callable[[], None]
    name_of_call: str = ""
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    calls: int = field(default=0)

    @property
    def name(self) -> str:
        return str(self.vm.name)

    @property
    def address(self) -> tuple[str, ...]:
        return tuple(self.vm.address)

    @property
    def process(self) -> int | None:
        process: int | None = self.vm.process
        return process

    def __getattr__(self, name: str) -> Any:
        passed_on = getattr(self.vm, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            self.calls = next(self.numbers)
            fatal = self.calls == self.call or name == self.name_of_call
            if fatal and self.moment == "before":
                self.die()
            result = passed_on(*args, **kwargs)
            if fatal and self.moment == "after":
                self.die()
            return result

        return called


def kill_ourselves() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    socket, device, top, base, call, moment, count_file, direction = sys.argv[1:]
    with live.QmpVm(socket, device=device) as disk:
        dying = DyingVm(disk, int(call), MOMENTS[moment], kill_ourselves)
        options = LiveOptions(
            delete=True, bandwidth=64 << 20, direction="pull" if direction == "pull" else "commit"
        )
        live.merge(dying, top, base, options=options)
    Path(count_file).write_text(str(dying.calls), encoding="ascii")


if __name__ == "__main__":
    main()
