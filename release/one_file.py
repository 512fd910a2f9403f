# SPDX-License-Identifier: Apache-2.0
"""The program as one file that runs where there is a Python, and nothing is installed."""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from release.pins import REQUIREMENTS, tool
from release.project import environment

if TYPE_CHECKING:
    from release.project import Project

PYTHONS: Final = ("3.11", "3.12", "3.13")


def build_one_file(project: Project, wheel: Path, into: Path) -> None:
    """Write ``chainmerge-VERSION.pex``, with the compiled modules of each Python in PYTHONS."""
    with tempfile.TemporaryDirectory() as scratch:
        # As a file its path, which is of this machine, would become a part of the result.
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        own = f"chainmerge=={project.version} --hash=sha256:{digest}\n"
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text(REQUIREMENTS.read_text(encoding="utf-8") + own, encoding="utf-8")
        command = [
            *(tool("pex"), "--requirement", str(requirements), "--find-links", str(into)),
            *("--no-build", "--intransitive", "--script", "chainmerge"),
            *("--venv", "--python-shebang", "/usr/bin/env python3"),
            *(word for python in PYTHONS for word in ("--platform", _platform(project, python))),
            *("--output-file", str(into / f"chainmerge-{project.version}.pex")),
        ]
        subprocess.run(command, env=environment(project), check=True)


def _platform(project: Project, python: str) -> str:
    return f"manylinux_2_28_{project.machine}-cp-{python}.0-cp{python.replace('.', '')}"
