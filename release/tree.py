# SPDX-License-Identifier: Apache-2.0
"""The tree of files that a package installs: an environment under /opt, and what leads to it."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from release.pins import install, install_wheel
from release.project import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from release.project import Project

HOME: Final = Path("opt/chainmerge")
MANUALS: Final = ROOT / "build/man"
CONTRIB: Final = ROOT / "contrib"

# Isolated: a command of root's must not load what PYTHONPATH or a home directory offers.
_COMMAND: Final = """\
#!/opt/chainmerge/bin/python3 -I
from chainmerge.cli.main import main

main()
"""


@dataclass(frozen=True, slots=True)
class Built:
    """What all packages are made from."""

    wheel: Path
    command: Path
    """The program, installed from that wheel for the Python that builds."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """What differs between those that packages are made for."""

    python: str
    """Its version as "3.11"; the package needs ``/usr/bin/python3.11``."""
    libvirt_modules: str
    """Where its package of libvirt's bindings has the modules."""
    zsh_completions: str


def make_tree(project: Project, distribution: Distribution, built: Built, tree: Path) -> None:
    """Lay all files of a package out below a directory, as they are to be below ``/``."""
    shutil.rmtree(tree, ignore_errors=True)
    packages = _make_environment(project, distribution, built.wheel, tree)
    _link_libvirt(project, distribution, packages)
    _link(tree / "usr/bin/chainmerge", Path("/") / HOME / "bin/chainmerge")
    _add_completions(distribution, built.command, tree)
    _add_manuals(tree)
    _add_units_and_configuration(tree)
    _add_documents(tree)
    settle(tree, project.epoch)


def settle(tree: Path, epoch: int) -> None:
    """Give everything in a tree the same modes and the same time, wherever it is made."""
    for path in _everything_in(tree):
        if not path.is_symlink():
            executable = path.is_dir() or path.stat().st_mode & 0o100
            path.chmod(0o755 if executable else 0o644)
        os.utime(path, (epoch, epoch), follow_symlinks=False)


def compressed(content: bytes) -> bytes:
    """Return a gzip file that says neither when it was made nor from what."""
    return gzip.compress(content, compresslevel=9, mtime=0)


def _make_environment(
    project: Project, distribution: Distribution, wheel: Path, tree: Path
) -> Path:
    """Make what ``python -m venv`` makes, at the place where it will be; return site-packages."""
    home = tree / HOME
    packages = home / f"lib/python{distribution.python}/site-packages"
    packages.mkdir(parents=True)
    install(project, distribution.python, packages)
    install_wheel(project, distribution.python, packages, wheel)
    _prune(packages)
    _link(home / "bin/python3", Path(f"/usr/bin/python{distribution.python}"))
    _link(home / "bin/python", Path("python3"))
    _write_program(home / "bin/chainmerge", _COMMAND.encode())
    _write(
        home / "pyvenv.cfg",
        b"home = /usr/bin\ninclude-system-site-packages = false\n"
        + f"version = {distribution.python}\n".encode(),
    )
    return packages


def _prune(packages: Path) -> None:
    """Remove what only installers read (it has paths of this machine), and numpy's own tests."""
    shutil.rmtree(packages / "bin", ignore_errors=True)
    for pattern in (".lock", "*.dist-info/RECORD", "*.dist-info/REQUESTED", "*.dist-info/*.json"):
        for path in packages.glob(pattern):
            if "sboms" not in path.parts:
                path.unlink()
    for directory in list((packages / "numpy").rglob("tests")):
        shutil.rmtree(directory, ignore_errors=True)


def _link_libvirt(project: Project, distribution: Distribution, packages: Path) -> None:
    """Let the distribution's libvirt modules be found, once they are there, and nothing else."""
    compiled = f"cpython-{distribution.python.replace('.', '')}-{project.machine}-linux-gnu.so"
    for module in ("libvirt", "libvirt_qemu"):
        name = f"{module}.py"
        _link(packages / name, Path(distribution.libvirt_modules) / name)
    for module in ("libvirtmod", "libvirtmod_qemu"):
        name = f"{module}.{compiled}"
        _link(packages / name, Path(distribution.libvirt_modules) / name)


def _add_completions(distribution: Distribution, command: Path, tree: Path) -> None:
    places = {
        "bash": "usr/share/bash-completion/completions/chainmerge",
        "zsh": f"{distribution.zsh_completions}/_chainmerge",
        "fish": "usr/share/fish/vendor_completions.d/chainmerge.fish",
    }
    for shell, place in places.items():
        script = subprocess.run([command, "completion", shell], check=True, capture_output=True)
        _write(tree / place, script.stdout)


def _add_manuals(tree: Path) -> None:
    for page in sorted(MANUALS.glob("*.[1-8]")):
        section = page.suffix[1:]
        _write(tree / f"usr/share/man/man{section}/{page.name}.gz", compressed(page.read_bytes()))


def _add_units_and_configuration(tree: Path) -> None:
    for unit in sorted((CONTRIB / "systemd").glob("chainmerge*")):
        _write(tree / "usr/lib/systemd/system" / unit.name, unit.read_bytes())
    configuration = CONTRIB / "config.toml"
    if configuration.exists():
        _write(tree / "etc/chainmerge/config.toml", configuration.read_bytes())


def _add_documents(tree: Path) -> None:
    documents = tree / "usr/share/doc/chainmerge"
    for page in ("README.md", "SECURITY.md"):
        _write(documents / page, (ROOT / page).read_bytes())
    _write(documents / "changelog.gz", compressed((ROOT / "CHANGELOG.md").read_bytes()))
    if CONTRIB.exists():
        shutil.copytree(CONTRIB, documents / "examples", symlinks=True)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _write_program(path: Path, content: bytes) -> None:
    _write(path, content)
    path.chmod(0o755)


def _link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def _everything_in(tree: Path) -> Iterator[Path]:
    yield tree
    yield from tree.rglob("*")
