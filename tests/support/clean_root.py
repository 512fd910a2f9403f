# SPDX-License-Identifier: Apache-2.0
"""A Debian on which nothing is installed, as a directory in which commands run."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.support.cli import Ran

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[2]

# Processes of this machine are not to be seen: a package's scripts look for those of chainmerge.
_INSIDE: Final = (
    *("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c"),
    # A mount of its own: rpm changes how mounts below / spread.
    'mount --bind "$0" "$0" && mount -t proc proc "$0/proc" && exec chroot "$0" sh -c "$1"',
)
_ENVIRONMENT: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
}

_WRITTEN_BY_ANY_INSTALLATION: Final = (
    "/proc/",
    "/tmp/",
    "/var/cache/apt/",
    "/var/lib/apt/",
    "/var/lib/dpkg/",
    "/var/log/",
)
_BY_ITS_TEXT: Final = ("/etc/", "/opt/", "/usr/bin/")


@dataclass(frozen=True, slots=True)
class CleanRoot:
    """The root file system of a machine that only runs what a test starts."""

    path: Path

    def run(self, script: str) -> Ran:
        """Run a script of the shell to its end."""
        result = subprocess.run(
            [*_INSIDE, self.path, script],
            check=False,
            capture_output=True,
            env=_ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=1200,
        )
        return Ran(result.returncode, result.stdout, result.stderr)

    def do(self, script: str) -> str:
        """Run a script that must succeed, and return what it printed."""
        ran = self.run(script)
        assert ran.status == 0, f"{script}\n{ran.out}\n{ran.err}"
        return ran.out

    def receive(self, file: Path) -> str:
        """Copy a file of this machine there, and return its path there."""
        shutil.copy(file, self.path / "srv" / file.name)
        return f"/srv/{file.name}"

    def everything(self) -> dict[str, str]:
        """What there is, by path: type, mode, owner, and for what people edit or run its text."""
        paths = {f"/{path.relative_to(self.path)}": path for path in self.path.rglob("*")}
        return {
            name: _described(name, path)
            for name, path in paths.items()
            if not name.startswith(_WRITTEN_BY_ANY_INSTALLATION)
        }


def _described(name: str, path: Path) -> str:
    status = path.lstat()
    told = f"{stat.filemode(status.st_mode)} {status.st_uid}:{status.st_gid}"
    if path.is_symlink():
        return f"{told} -> {path.readlink()}"
    if path.is_file() and name.startswith(_BY_ITS_TEXT):
        return f"{told} {hashlib.sha256(path.read_bytes()).hexdigest()}"
    return told


@contextlib.contextmanager
def clean_root(suite: str, directory: Path) -> Iterator[CleanRoot]:
    """Unpack the root of a Debian release into a directory, which is removed in the end."""
    archive = subprocess.run(
        [ROOT / "scripts/clean-root", suite], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    directory.mkdir()
    try:
        subprocess.run(["tar", "-xf", archive, "-C", directory], check=True)
        shutil.copy("/etc/resolv.conf", directory / "etc/resolv.conf")
        yield CleanRoot(directory)
    finally:
        shutil.rmtree(directory)
