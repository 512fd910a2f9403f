# SPDX-License-Identifier: Apache-2.0
"""Packages for distributions with RPM, one for each version of Python that they come with."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

from release.project import environment
from release.tree import Built, Distribution, make_tree

if TYPE_CHECKING:
    from release.project import Project

SPEC: Final = Path(__file__).with_name("rpm") / "chainmerge.spec"


def _of_python(version: str) -> Distribution:
    return Distribution(
        python=version,
        libvirt_modules=f"/usr/lib64/python{version}/site-packages",
        zsh_completions="usr/share/zsh/site-functions",
    )


# Enterprise Linux 10, and 9 from its application streams; SUSE 16.
RPM_DISTRIBUTIONS: Final = (_of_python("3.12"), _of_python("3.13"))


def build_rpm(
    project: Project, distribution: Distribution, built: Built, work: Path, into: Path
) -> None:
    """Write ``chainmerge-VERSION-1.pyNNN.MACHINE.rpm``; what rpmbuild says is kept by the tree."""
    top = work / f"rpm{distribution.python}"
    tree = top / "tree"
    make_tree(project, distribution, built, tree)
    (top / "files").write_text("\n".join(_listed_files(tree)) + "\n", encoding="utf-8")
    facts = {
        "_topdir": str(top / "rpmbuild"),
        "tree": str(tree),
        "listed": str(top / "files"),
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
    log = top / "log"
    with log.open("wb") as file:
        subprocess.run(
            ["rpmbuild", "-bb", *defined, str(SPEC)],
            env=environment(project),
            check=True,
            stdout=file,
            stderr=file,
        )
    (package,) = (top / "rpmbuild/RPMS").rglob("*.rpm")
    shutil.copy(package, into)


def _listed_files(tree: Path) -> list[str]:
    """Every file, and of directories those that no other package has."""
    own = [tree / "opt/chainmerge", tree / "usr/share/doc/chainmerge", tree / "etc/chainmerge"]
    lines = []
    for path in sorted(tree.rglob("*")):
        name = f'"/{path.relative_to(tree)}"'
        if path.is_dir() and not path.is_symlink():
            if any(path == directory or path.is_relative_to(directory) for directory in own):
                lines.append(f"%dir {name}")
        elif path.is_relative_to(tree / "etc"):
            lines.append(f"%config(noreplace) {name}")
        else:
            lines.append(name)
    return lines
