# SPDX-License-Identifier: Apache-2.0
"""The Containerfile, built without a registry on a Debian that is made here."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from release.project import ROOT
from tests.support.clean_root import clean_root
from tests.support.cli import environment
from tests.support.merge_elsewhere import build_pair

if TYPE_CHECKING:
    from collections.abc import Iterator

BASE: Final = "docker.io/library/debian:13-slim"


@dataclass(frozen=True, slots=True)
class Buildah:
    """A store of images that nobody else uses; neither a daemon nor a kernel's overlays."""

    store: Path

    def __call__(self, *words: str | Path) -> str:
        places = ("--root", self.store / "images", "--runroot", self.store / "run")
        return subprocess.run(
            ["buildah", *places, *words],
            check=True,
            env=environment(STORAGE_DRIVER="vfs", BUILDAH_ISOLATION="chroot"),
            stdout=subprocess.PIPE,
            text=True,
        ).stdout.strip()


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    directory = tmp_path_factory.mktemp("containers")
    called = Buildah(directory)
    with clean_root("trixie", directory / "root") as root:
        base = called("from", "scratch")
        called("copy", "--quiet", base, root.path, "/")
        called("commit", "--quiet", "--rm", base, BASE)
    yield called
    called("rm", "--all")
    called("rmi", "--all", "--force")


def test_it_looks_at_images(dist: Path, buildah: Buildah, tmp_path: Path) -> None:
    assert (dist / "SHA256SUMS").exists()
    buildah("bud", "--quiet", "--pull-never", "--layers=false", "--tag", "chainmerge", ROOT)
    entry = json.loads(buildah("inspect", "--type", "image", "chainmerge"))["OCIv1"]["config"]
    assert (entry["Entrypoint"], entry["Cmd"]) == (["chainmerge"], ["--help"])
    images = tmp_path / "images"
    top = build_pair(images)
    before = {path: path.read_bytes() for path in images.iterdir()}
    container = buildah("from", "--pull-never", "chainmerge")

    def run(mode: str, *words: str | Path) -> str:
        mounted = f"{images}:{images}:{mode}"
        return buildah("run", "--volume", mounted, container, "--", "chainmerge", *words)

    assert json.loads(run("ro", "info", "--json", top))["image"] == str(top)
    # Where nothing can be written a merge is refused, and the plan says so.
    assert "top.qcow2 into base.qcow2" in run("rw", "plan", top)
    assert "top.qcow2" in run("ro", "scan", images)
    run("ro", "report", images, "--output", "/tmp/report.html")
    assert {path: path.read_bytes() for path in images.iterdir()} == before
