# SPDX-License-Identifier: Apache-2.0
"""Packages for distributions with RPM, one for each version of Python that they come with."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from release.project import environment
from release.tree import Built, Distribution, make_tree

if TYPE_CHECKING:
    from release.project import Project

SPEC: Final = Path(__file__).with_name("rpm") / "chainmerge.spec"


_OWN_DIRECTORIES: Final = (
    "etc/chainmerge",
    "opt/chainmerge",
    "usr/share/doc/chainmerge",
    # Not there where the shell is not.
    "usr/share/bash-completion",
    "usr/share/fish",
    "usr/share/zsh",
)


def _of_python(version: str) -> Distribution:
    return Distribution(
        python=version,
        libvirt_modules=f"/usr/lib64/python{version}/site-packages",
        zsh_completions="usr/share/zsh/site-functions",
    )


# Enterprise Linux 10, and 9 from its application streams; SUSE 16.
RPM_DISTRIBUTIONS: Final = (_of_python("3.12"), _of_python("3.13"))


def build_rpm(project: Project, distribution: Distribution, built: Built, into: Path) -> None:
    """Write ``chainmerge-VERSION-1.pyNNN.MACHINE.rpm``."""
    # Not in a directory of the project: rpmbuild takes paths apart at spaces.
    with tempfile.TemporaryDirectory() as scratch:
        top = Path(scratch)
        make_tree(project, distribution, built, top / "tree")
        listed = "\n".join(_listed_files(top / "tree"))
        (top / "files").write_text(f"{listed}\n", encoding="utf-8")
        _run_rpmbuild(project, distribution, top)
        (package,) = (top / "RPMS").rglob("*.rpm")
        shutil.copy(package, into)


def _run_rpmbuild(project: Project, distribution: Distribution, top: Path) -> None:
    facts = {
        "_topdir": str(top),
        "project_version": project.version,
        "project_summary": project.summary.partition(":")[0],
        "python": distribution.python,
        "python_tag": f"py{distribution.python.replace('.', '')}",
        # Of the machine and the moment that build it nothing goes into it.
        "_buildhost": "localhost",
        "use_source_date_epoch_as_buildtime": "1",
        "clamp_mtime_to_source_date_epoch": "1",
        "_binary_payload": "w9.zstdio",
    }
    defined = [word for name, value in facts.items() for word in ("-D", f"{name} {value}")]
    ran = subprocess.run(
        ["rpmbuild", "-bb", *defined, str(SPEC)],
        env=environment(project),
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    # It warns of each link that leads out of the package, which is what the links are for.
    if ran.returncode != 0:
        print(ran.stdout, file=sys.stderr)
        ran.check_returncode()


def _listed_files(tree: Path) -> list[str]:
    """Every file, and the directories that might be nobody else's."""
    own = [tree / directory for directory in _OWN_DIRECTORIES]
    lines = []
    for path in sorted(tree.rglob("*")):
        name = f'"/{path.relative_to(tree)}"'
        if path.is_dir() and not path.is_symlink():
            if any(path.is_relative_to(directory) for directory in own):
                lines.append(f"%dir {name}")
        elif path.is_relative_to(tree / "etc"):
            lines.append(f"%config(noreplace) {name}")
        else:
            lines.append(name)
    return lines
