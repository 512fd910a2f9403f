# SPDX-License-Identifier: Apache-2.0
"""The packages with RPM, by Debian's rpm: one on a machine that has its Python, both by content."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from chainmerge import __version__
from release.rpm import RPM_DISTRIBUTIONS
from tests.packages.conftest import one
from tests.support.clean_root import clean_root
from tests.support.merge_elsewhere import assert_merges
from tests.support.qemu import run

if TYPE_CHECKING:
    from pathlib import Path

PYTHON_OF_TRIXIE: Final = "3.13"


def _package(dist: Path, python: str) -> Path:
    return one(dist, f"*.py{python.replace('.', '')}.*.rpm")


@pytest.mark.parametrize("python", [found.python for found in RPM_DISTRIBUTIONS])
def test_it_holds_what_its_python_loads(dist: Path, python: str) -> None:
    package = _package(dist, python)
    files = run("rpm", "-qp", "--list", package).stdout.splitlines()
    compiled = [file for file in files if ".cpython-" in file]
    assert len(compiled) > 10
    assert {file.split(".cpython-")[1].split("-")[0] for file in compiled} == {
        python.replace(".", "")
    }
    home = f"/opt/chainmerge/lib/python{python}/site-packages/chainmerge"
    assert f"{home}/cli/main.py" in files
    needed = run("rpm", "-qp", "--requires", package).stdout.splitlines()
    assert {f"/usr/bin/python{python}", "/usr/bin/qemu-img"} <= set(needed)


def test_it_is_installed_used_and_removed(dist: Path, tmp_path: Path) -> None:
    package = _package(dist, PYTHON_OF_TRIXIE)
    with clean_root("trixie", tmp_path / "root") as root:
        received = root.receive(package)
        root.do("apt-get -y install rpm python3 qemu-utils && rpm --initdb")
        before = root.everything()
        # Debian's own packages are not in RPM's books.
        root.do(f"rpm --nodeps --install {received}")
        assert root.do("chainmerge --version") == f"chainmerge {__version__}\n"
        assert_merges(root, "chainmerge")
        root.do(f"rpm --verify --nodeps --nomtime {received.rpartition('/')[2][:-4]}")
        root.do("rpm --erase chainmerge")
        after = root.everything()
        left = {
            path
            for path, told in after.items()
            if before.get(path) != told and not path.startswith("/var/lib/rpm/")
        }
        assert left == set()
        # Empty, and of a package that is not in RPM's books.
        assert before.keys() - after.keys() <= {"/usr/share/fish/vendor_completions.d"}
