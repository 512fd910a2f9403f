# SPDX-License-Identifier: Apache-2.0
"""The dependencies that packages carry: each of one version, known by the digests of its wheels."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from release.project import ROOT, environment

if TYPE_CHECKING:
    from release.project import Project

REQUIREMENTS: Final = Path(__file__).with_name("requirements.txt")
OLDEST_PYTHON: Final = "3.11"

FROM_THE_SYSTEM: Final = frozenset({"libvirt"})
"""Extras whose module is that of the distribution: it has to fit the daemon that runs there."""

_LIBRARIES_OF_THE_SYSTEM: Final = ("psycopg-binary",)
"""Wheels that carry copies of OpenSSL and the like, where the distribution mends its own."""

_HEADER: Final = """\
# SPDX-License-Identifier: Apache-2.0
# What the packages carry. `make lock` writes it anew from pyproject.toml.
"""


def lock(project: Project) -> None:
    """Write the newest versions that pyproject.toml allows, for every Python at once."""
    command = [
        *(tool("uv"), "pip", "compile", "--quiet", "--universal", "--fork-strategy", "fewest"),
        *("--python-version", OLDEST_PYTHON, "--generate-hashes", "--no-header", "--no-annotate"),
        *(f"--extra={extra}" for extra in sorted(set(project.extras) - FROM_THE_SYSTEM)),
        *(f"--no-emit-package={package}" for package in _LIBRARIES_OF_THE_SYSTEM),
        "pyproject.toml",
    ]
    found = subprocess.run(
        command, cwd=ROOT, env=environment(project), check=True, stdout=subprocess.PIPE, text=True
    )
    REQUIREMENTS.write_text(_HEADER + found.stdout, encoding="utf-8")


def install(project: Project, python: str, directory: Path) -> None:
    """Put the wheels for a version of Python, as "3.11", into a directory."""
    _uv_install(project, python, directory, "--require-hashes", "--requirement", str(REQUIREMENTS))


def install_wheel(project: Project, python: str, directory: Path, wheel: Path) -> None:
    """Put the project's own wheel beside them."""
    _uv_install(project, python, directory, "--no-index", str(wheel))


def make_environment(project: Project, wheel: Path, directory: Path) -> None:
    """Install the program with what packages carry, for the Python that builds, to be run here."""
    create = [tool("uv"), "venv", "--quiet", "--clear", "--no-config", "--python", sys.executable]
    subprocess.run([*create, str(directory)], env=environment(project), check=True)
    install = [tool("uv"), "pip", "install", "--quiet", "--no-deps", "--no-config"]
    into = ["--link-mode", "copy", "--python", str(directory / "bin/python")]
    for what in (["--require-hashes", "--requirement", str(REQUIREMENTS)], [str(wheel)]):
        subprocess.run([*install, *into, *what], env=environment(project), check=True)


def tool(name: str) -> str:
    """Return the path of a command that came with the group ``release``."""
    return str(Path(sys.executable).with_name(name))


def _uv_install(project: Project, python: str, directory: Path, *what: str) -> None:
    command = [
        *(tool("uv"), "pip", "install", "--quiet", "--no-deps", "--no-config"),
        *("--only-binary", ":all:", "--link-mode", "copy", "--target", str(directory)),
        *("--python-version", python),
        # The glibc of Enterprise Linux 8 and all that is newer.
        *("--python-platform", f"{project.machine}-manylinux_2_28"),
    ]
    subprocess.run([*command, *what], env=environment(project), check=True)
