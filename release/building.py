# SPDX-License-Identifier: Apache-2.0
"""All artefacts of a release, in order: what is made later is made from what was made before."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Final

from release.debian import DEBIANS, build_deb
from release.one_file import build_one_file
from release.parts_list import write_parts_list
from release.pins import make_environment
from release.project import ROOT, environment
from release.rpm import RPM_DISTRIBUTIONS, build_rpm
from release.tree import Built

if TYPE_CHECKING:
    from pathlib import Path

    from release.project import Project

WORK: Final = ROOT / "build/release"
SUMS: Final = "SHA256SUMS"


def build_all(project: Project, into: Path) -> None:
    """Fill a directory, which is emptied first, with the release."""
    shutil.rmtree(into, ignore_errors=True)
    shutil.rmtree(WORK, ignore_errors=True)
    into.mkdir(parents=True)
    built = _build_wheel(project, into)
    _say("one file")
    build_one_file(project, built.wheel, into)
    _say("list of parts")
    write_parts_list(project, built.command, into)
    for debian in DEBIANS:
        _say(f"Debian {debian.number}")
        build_deb(project, debian, built, WORK, into)
    for distribution in RPM_DISTRIBUTIONS:
        _say(f"RPM for Python {distribution.python}")
        build_rpm(project, distribution, built, into)
    _write_sums(into)


def _build_wheel(project: Project, into: Path) -> Built:
    _say("source and wheel")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(into), str(ROOT)]
    subprocess.run(build, env=environment(project), check=True, stdout=subprocess.DEVNULL)
    (wheel,) = into.glob("*.whl")
    make_environment(project, wheel, WORK / "environment")
    return Built(wheel, WORK / "environment/bin/chainmerge")


def _write_sums(into: Path) -> None:
    files = sorted(into.iterdir())
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (into / SUMS).write_text("".join(lines), encoding="utf-8")


def _say(what: str) -> None:
    print(f"dist: {what}", file=sys.stderr, flush=True)
