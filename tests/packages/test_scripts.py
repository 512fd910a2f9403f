# SPDX-License-Identifier: Apache-2.0
"""What the scripts of packages take for a chainmerge that runs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Final

import pytest

RELEASE: Final = Path(__file__).parents[2] / "release"
BIN: Final = "/opt/chainmerge/bin"


def _question(script: str) -> str:
    """The words of a script that ask which processes run."""
    text = (RELEASE / script).read_text("utf-8")
    found: str
    (found,) = re.findall(r"^running=\$\((.*)\)(?: \\)?$", text, re.MULTILINE)
    # What rpm makes of it in a macro.
    return found.replace("\\\\", "\\") if script.startswith("rpm") else found


@pytest.mark.parametrize("script", ["debian/prerm", "rpm/chainmerge.spec"])
@pytest.mark.parametrize(
    ("called", "counts"),
    [
        # The command, and a program of somebody else's that imports chainmerge.
        (f"{BIN}/python3", True),
        (f"{BIN}/python", True),
        ("/usr/bin/python3", False),
        (f"/srv{BIN}/python3", False),
    ],
)
def test_every_python_of_the_package_is_one_that_runs(
    script: str, called: str, *, counts: bool
) -> None:
    with subprocess.Popen([called, "60"], executable="/bin/sleep") as process:
        try:
            told = subprocess.run(
                ["sh", "-c", _question(script)], capture_output=True, text=True, check=True
            )
        finally:
            process.kill()
    assert (str(process.pid) in told.stdout.split()) == counts
