# SPDX-License-Identifier: Apache-2.0
"""Packages for Debian, by dpkg-deb alone: there is nothing to compile, and nothing to guess."""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from typing import TYPE_CHECKING, Final

from release.project import environment
from release.tree import Built, Distribution, compressed, make_tree, settle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from release.project import Project

SCRIPTS: Final = Path(__file__).with_name("debian")
MAINTAINER: Final = "The chainmerge project"

_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}

_MODULES_OF_EXTRAS: Final = {"libvirt": "python3-libvirt", "fleet": "libpq5"}
"""What extras need of Debian itself."""


@dataclass(frozen=True, slots=True)
class Debian:
    """A release of Debian."""

    number: int
    codename: str
    python: str
    package_of_storage_daemon: str

    @property
    def distribution(self) -> Distribution:
        """Where its packages have what all distributions have somewhere."""
        return Distribution(
            python=self.python,
            libvirt_modules="/usr/lib/python3/dist-packages",
            zsh_completions="usr/share/zsh/vendor-completions",
        )


DEBIANS: Final = (
    Debian(12, "bookworm", "3.11", "qemu-system-common"),
    Debian(13, "trixie", "3.13", "qemu-utils"),
)


def build_deb(project: Project, debian: Debian, built: Built, work: Path, into: Path) -> None:
    """Write ``chainmerge_VERSION-1~debNN_ARCHITECTURE.deb``."""
    tree = work / f"deb{debian.number}"
    make_tree(project, debian.distribution, built, tree)
    _add_debians_documents(project, debian, tree)
    _add_control_files(project, debian, tree)
    settle(tree, project.epoch)
    package = into / f"chainmerge_{_version(project, debian)}_{_architecture(project)}.deb"
    # More threads would cut the data into other blocks.
    build = ["dpkg-deb", "--root-owner-group", "-Zzstd", "-z12", "--threads-max=1", "--build"]
    subprocess.run(
        [*build, str(tree), str(package)],
        env=environment(project),
        check=True,
        stdout=subprocess.DEVNULL,
    )


def _version(project: Project, debian: Debian) -> str:
    # The package of the newer Debian is the newer one, so that an upgrade of Debian takes it.
    return f"{project.version}-1~deb{debian.number}"


def _architecture(project: Project) -> str:
    return _ARCHITECTURES[project.machine]


def _add_debians_documents(project: Project, debian: Debian, tree: Path) -> None:
    documents = tree / "usr/share/doc/chainmerge"
    (documents / "copyright").write_bytes((SCRIPTS / "copyright").read_bytes())
    changes = (
        f"chainmerge ({_version(project, debian)}) {debian.codename}; urgency=medium\n\n"
        "  * changelog.gz says what is new.\n\n"
        f" -- {MAINTAINER} <>  {formatdate(project.epoch)}\n"
    )
    (documents / "changelog.Debian.gz").write_bytes(compressed(changes.encode()))


def _add_control_files(project: Project, debian: Debian, tree: Path) -> None:
    files = sorted(path for path in tree.rglob("*") if path.is_file() and not path.is_symlink())
    control = tree / "DEBIAN"
    control.mkdir()
    size = sum(file.stat().st_size for file in files) // 1024
    (control / "control").write_text("\n".join(_control(project, debian, size)), "utf-8")
    (control / "md5sums").write_text(
        "".join(f"{_md5(file)}  {file.relative_to(tree)}\n" for file in files), "utf-8"
    )
    if configuration := [file for file in files if file.is_relative_to(tree / "etc")]:
        names = "".join(f"/{file.relative_to(tree)}\n" for file in configuration)
        (control / "conffiles").write_text(names, "utf-8")
    for script in ("postinst", "prerm", "postrm"):
        content = (SCRIPTS / script).read_text("utf-8")
        (control / script).write_text(content, "utf-8")
        (control / script).chmod(0o755)


def _md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()


def _control(project: Project, debian: Debian, size: int) -> Iterator[str]:
    modules = [package for extra, package in _MODULES_OF_EXTRAS.items() if extra in project.extras]
    yield "Package: chainmerge"
    yield f"Version: {_version(project, debian)}"
    yield f"Architecture: {_architecture(project)}"
    yield f"Maintainer: {MAINTAINER}"
    yield f"Installed-Size: {size}"
    yield f"Depends: python{debian.python}, libc6 (>= 2.28), qemu-utils"
    yield f"Recommends: {', '.join(dict.fromkeys([debian.package_of_storage_daemon, *modules]))}"
    yield "Suggests: lvm2"
    yield "Section: admin"
    yield "Priority: optional"
    yield f"Description: {project.summary.partition(':')[0]}"
    yield " chainmerge moves the data of a qcow2 overlay down into an image below it, with the"
    yield " persistent dirty bitmaps that incremental backups live off, and loses neither. The VM"
    yield " may be stopped or running."
    yield ""
