# SPDX-License-Identifier: Apache-2.0
"""What of the project goes into every artefact: its version, its date, where its files are."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Project:
    """The project as it is released."""

    version: str
    summary: str
    epoch: int
    """Seconds since 1970 of the last commit: no file of a release is younger."""
    machine: str
    """The processor, as ``uname -m`` names it."""
    dependencies: tuple[str, ...]
    extras: dict[str, tuple[str, ...]]


def read_project() -> Project:
    """Read pyproject.toml, the version, and the time of the last commit.

    Raises:
        subprocess.CalledProcessError: This is no clone, and SOURCE_DATE_EPOCH is not set.
    """
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["project"]
    about = (ROOT / "src/chainmerge/__about__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"$', about, re.MULTILINE)
    assert version
    return Project(
        version=version[1],
        summary=declared["description"],
        epoch=_epoch(),
        machine=platform.machine(),
        dependencies=tuple(declared["dependencies"]),
        extras={name: tuple(needed) for name, needed in declared["optional-dependencies"].items()},
    )


def environment(project: Project) -> dict[str, str]:
    """Return the environment of the tools: what they make depends on nothing of this machine."""
    return os.environ | {
        "SOURCE_DATE_EPOCH": str(project.epoch),
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
    }


def _epoch() -> int:
    if (given := os.environ.get("SOURCE_DATE_EPOCH")) is not None:
        return int(given)
    log = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    return int(subprocess.run(log, check=True, capture_output=True, text=True).stdout)
