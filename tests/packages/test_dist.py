# SPDX-License-Identifier: Apache-2.0
"""All of a release: the same bytes again, sums, the list of parts, the one file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from chainmerge import __version__
from release.project import ROOT, read_project
from tests.packages.conftest import one
from tests.support.clean_root import clean_root
from tests.support.merge_elsewhere import assert_merges
from tests.support.qemu import run

if TYPE_CHECKING:
    from release.debian import Debian

PYTHON: Final = ROOT / "build/release-tools/bin/python"


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def test_made_elsewhere_it_has_the_same_bytes(dist: Path, tmp_path: Path) -> None:
    """From another directory, without git, with another umask, time zone and language."""
    listed = run("git", "-C", ROOT, "ls-files", "-z", "-co", "--exclude-standard").stdout
    copy = tmp_path / "another name"
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    if (ROOT / "build/man").exists():
        shutil.copytree(ROOT / "build/man", copy / "build/man")
    again = tmp_path / "again"
    subprocess.run(
        ["bash", "-c", 'umask 077; exec "$@"', "bash", PYTHON, "-m", "release", "dist", again],
        cwd=copy,
        check=True,
        env=os.environ
        | {
            "SOURCE_DATE_EPOCH": str(read_project().epoch),
            "TZ": "Pacific/Auckland",
            "LC_ALL": "C",
            "TMPDIR": str(tmp_path),
        },
    )
    assert (again / "SHA256SUMS").read_text() == (dist / "SHA256SUMS").read_text()


def test_the_sums_are_those_of_all_files(dist: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=dist, check=True)
    summed = {line.split()[1] for line in (dist / "SHA256SUMS").read_text().splitlines()}
    assert summed | {"SHA256SUMS"} == {path.name for path in dist.iterdir()}


def test_the_list_of_parts_has_all_that_a_package_carries(dist: Path) -> None:
    listed = json.loads(one(dist, "*.cdx.json").read_bytes())
    component = listed["metadata"]["component"]
    assert (component["name"], component["version"]) == ("chainmerge", __version__)
    told = {(_normal(part["name"]), part["version"]) for part in listed["components"]}
    files = run("dpkg-deb", "-c", one(dist, "*deb12*.deb")).stdout.split()
    carried = {
        Path(file).name.removesuffix(".dist-info").rpartition("-")
        for file in files
        if file.endswith(".dist-info/")
    }
    assert {(_normal(name), version) for name, _, version in carried} == {
        *told,
        ("chainmerge", __version__),
    }
    assert all(part["purl"].startswith("pkg:pypi/") for part in listed["components"])
    without = {part["name"] for part in listed["components"] if not part.get("licenses")}
    # Its metadata names the file of its licence (MIT) alone.
    assert without <= {"rich-click"}


def test_the_source_is_what_git_has(dist: Path) -> None:
    with tarfile.open(one(dist, "*.tar.gz")) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    tracked = set(run("git", "-C", ROOT, "ls-files").stdout.splitlines())
    assert {name for name in tracked if not name.startswith(".")} <= inside
    # Hatchling adds the metadata, and the list by which git ignores files.
    assert inside - tracked == {"PKG-INFO"}


def test_the_wheel_is_what_the_source_has(dist: Path) -> None:
    with zipfile.ZipFile(one(dist, "*.whl")) as archive:
        inside = {name for name in archive.namelist() if name.startswith("chainmerge/")}
    sources = (ROOT / "src/chainmerge").rglob("*")
    there = {
        str(path.relative_to(ROOT / "src"))
        for path in sources
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert inside == there


def test_one_file_runs_where_nothing_is_installed(
    dist: Path, debian: Debian, tmp_path: Path
) -> None:
    with clean_root(debian.codename, tmp_path / "root") as root:
        root.do("apt-get -y install python3 qemu-utils")
        program = root.receive(one(dist, "*.pex"))
        assert root.do(f"{program} --version") == f"chainmerge {__version__}\n"
        assert_merges(root, program)
