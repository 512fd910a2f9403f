# SPDX-License-Identifier: Apache-2.0
"""Whole lives of disks: merges of every kind, kills, people's own deeds, and commands run again."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, event, given, note, settings
from hypothesis import strategies as st

from tests.conftest import SOAK
from tests.lifecycle.life import Life, LifeViolated, Step
from tests.lifecycle.storage import Files, volumes
from tests.support.loopdev import mounted_file_system

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lifecycle.storage import Storage

# By how often they come.
KINDS = (
    *("merge",) * 6, *("again",) * 6, *("write",) * 4, *("snapshot",) * 4, *("status",) * 2,
    *("revert",) * 3, *("internal_snapshot",) * 3, *("foreign_commit",) * 2,
    *("restore",) * 2, *("checkpoint",) * 2, "drop_checkpoint", "branch", "resize",
    "flatten", "relink", "rename", "back_up", "renumber", "merge_disks", "prune", "repair",
    "live_merge", "new_disk",
)  # fmt: skip
DEATHS = (*(None,) * 12, 1, 2, 4, 7, 11, 16, 22, 30, 40)

steps = st.builds(
    Step,
    kind=st.sampled_from(KINDS),
    pick=st.integers(0, 5),
    flags=st.integers(0, 479),
    dies_at=st.sampled_from(DEATHS),
)
lives = st.lists(steps, min_size=6, max_size=14)
# What all lives begin with: two snapshots, a checkpoint across them.
CHILDHOOD = (
    Step("checkpoint"),
    Step("write", flags=3),
    Step("snapshot"),
    Step("write", flags=7),
    Step("snapshot"),
    Step("write", flags=11),
)


@contextmanager
def storage_of(kind: str, directory: Path) -> Iterator[Storage]:
    """A place for the images of one life."""
    if kind == "volumes":
        with volumes(directory) as made:
            yield made
    else:
        images = directory / "images"
        images.mkdir()
        yield Files(images)


@pytest.fixture(scope="module")
def ext4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Inodes without a time of birth, whose numbers are used again at once."""
    directory = tmp_path_factory.mktemp("ext4")
    with mounted_file_system(directory, "ext4", 512 << 20, "-I", "128") as mounted:
        yield mounted


@pytest.fixture(scope="module")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("xfs")
    with mounted_file_system(directory, "xfs", 512 << 20) as mounted:
        yield mounted


@pytest.fixture(scope="module")
def volume_stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("volumes")


def live(where: Path, kind: str, life: list[Step]) -> None:
    """Live one life, from childhood on."""
    with (
        tempfile.TemporaryDirectory(dir=where) as directory,
        tempfile.TemporaryDirectory() as scratch,
        storage_of(kind, Path(directory)) as storage,
    ):
        lived = Life(storage, Path(scratch))
        try:
            lived.new_disk()
            for step in (*CHILDHOOD, *life):
                lived.do(step)
        except LifeViolated:
            note("\n".join(lived.story))
            raise
        for what in lived.happened:
            event(what)


lifelike = settings(
    deadline=None,
    max_examples=340 if SOAK else 17,
    suppress_health_check=list(HealthCheck),
    # A life takes seconds: to find a shorter one that fails would take hours.
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)


@lifelike
@given(life=lives)
def test_lives_on_files_whose_inodes_have_no_birth(ext4: Path, life: list[Step]) -> None:
    live(ext4, "files", life)


@lifelike
@given(life=lives)
def test_lives_on_files(xfs: Path, life: list[Step]) -> None:
    live(xfs, "files", life)


@lifelike
@given(life=lives)
def test_lives_on_volumes(volume_stores: Path, life: list[Step]) -> None:
    live(volume_stores, "volumes", life)
