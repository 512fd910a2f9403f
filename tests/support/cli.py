# SPDX-License-Identifier: Apache-2.0
"""The command line as a user meets it: a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

SOURCES: Final = Path(__file__).parents[2] / "src"
COMMAND: Final = (sys.executable, "-m", "chainmerge")


@dataclass(frozen=True)
class Ran:
    """How a command ended, and what it said."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The last line of standard output as JSON."""
        return json.loads(self.out.splitlines()[-1])


def environment(**more: str) -> dict[str, str]:
    """The environment for a command, in which it finds the package wherever it is started."""
    # pytest-xdist tells its workers how wide its own terminal is.
    inherited = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    # Whoever runs the tests may have a configuration. Nothing can be made below this.
    own = {"PYTHONPATH": str(SOURCES), "XDG_CONFIG_HOME": "/dev/null"}
    return {**inherited, **own, **more}


def chainmerge(*arguments: str | Path, **more_environment: str) -> Ran:
    """Run a command to its end."""
    result = subprocess.run(
        [*COMMAND, *(str(argument) for argument in arguments)],
        capture_output=True,
        check=False,
        env=environment(**more_environment),
        timeout=120,
    )
    return Ran(
        result.returncode,
        result.stdout.decode("utf-8", "surrogateescape"),
        result.stderr.decode("utf-8", "surrogateescape"),
    )
