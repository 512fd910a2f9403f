# SPDX-License-Identifier: Apache-2.0
"""``bitmaps repair``: what is in the way of backups goes everywhere, and nothing else does."""

from __future__ import annotations

import os
import pty
import subprocess
from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge.bitmaps.errors import (
    BitmapMissing,
    BrokenBitmapsInTheWay,
    MergeToFinishFirst,
    RemovalUnsafe,
)
from chainmerge.errors import ExitCode
from chainmerge.options import Access
from chainmerge.records.saved_bitmaps import SAVED_BITMAPS
from chainmerge.storage.errors import ImageLocked
from chainmerge.storage.locks import LockMode, lock_image
from tests.support import cli
from tests.support.damage import mark_in_use
from tests.support.qemu import assert_clean, bitmap_names, content, create, qemu_img, qemu_io

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MIB = 1 << 20


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    """Three images, the active one first: "daily" is broken in the middle, "weekly" is whole."""
    base = create(tmp_path / "base.qcow2", 16 * MIB)
    middle = create(tmp_path / "middle.qcow2", backing="base.qcow2")
    leaf = create(tmp_path / "leaf.qcow2", backing="middle.qcow2")
    images = [leaf, middle, base]
    for image in images:
        for name in ("daily", "weekly"):
            chainmerge.bitmaps_add(image, name)
    qemu_io(leaf, "write -P 1 0 1M")
    mark_in_use(middle, "daily")
    return images


def names_of(images: list[Path]) -> list[set[str]]:
    return [set(bitmap_names(image)) for image in images]


def test_an_inconsistent_bitmap_goes_everywhere(chain: list[Path]) -> None:
    shown = content(chain[0])
    before = [image.read_bytes() for image in chain]
    planned = chainmerge.plan_bitmaps_repair(chain[0])
    assert [image.read_bytes() for image in chain] == before
    report = chainmerge.bitmaps_repair(chain[0])
    (found,) = report.unusable
    assert (found.name, found.images) == ("daily", tuple(map(str, chain)))
    assert found.reason == f"inconsistent (in-use) in {chain[1]}"
    assert [one.image for one in report.removed] == [str(image) for image in chain]
    assert (planned.unusable, planned.removed) == (report.unusable, report.removed)
    assert planned.dry_run
    assert not report.dry_run
    assert report.kept == ("weekly",)
    assert names_of(chain) == [{"weekly"}] * 3
    assert content(chain[0]) == shown
    for image in chain:
        assert_clean(image)
    chainmerge.bitmaps_add(chain[0], "daily")
    assert all(verdict.passes for verdict in chainmerge.bitmaps_list(chain[0]).verdicts)
    assert chainmerge.bitmaps_repair(chain[0]).unusable == ()


def test_a_checkpoint_with_a_gap_goes_and_what_is_disabled_or_stale_stays(
    tmp_path: Path,
) -> None:
    base = create(tmp_path / "base.qcow2", MIB)
    middle = create(tmp_path / "middle.qcow2", backing="base.qcow2")
    leaf = create(tmp_path / "leaf.qcow2", backing="middle.qcow2")
    for image, name in ((base, "gap"), (leaf, "gap"), (base, "stale"), (leaf, "frozen")):
        chainmerge.bitmaps_add(image, name)
    qemu_img("bitmap", "--disable", leaf, "frozen")
    report = chainmerge.bitmaps_repair(leaf)
    assert [one.name for one in report.unusable] == ["gap"]
    assert names_of([leaf, middle, base]) == [{"frozen"}, set(), {"stale"}]


def test_only_what_is_named(chain: list[Path]) -> None:
    mark_in_use(chain[2], "weekly")
    with pytest.raises(BitmapMissing):
        chainmerge.bitmaps_repair(chain[0], ["nothing"])
    before = [image.read_bytes() for image in chain]
    # A broken bitmap cannot be stored again.
    with pytest.raises(BrokenBitmapsInTheWay):
        chainmerge.bitmaps_repair(chain[0], ["daily"])
    assert [image.read_bytes() for image in chain] == before
    chainmerge.bitmaps_repair(chain[0], ["daily", "weekly"])
    assert names_of(chain) == [set()] * 3


def test_another_branch_keeps_its_checkpoints(chain: list[Path], tmp_path: Path) -> None:
    """The other one reads base: what is whole there stays, what is in-use is marked as lost."""
    other = create(tmp_path / "other.qcow2", backing="base.qcow2")
    chainmerge.bitmaps_add(other, "daily")
    chainmerge.bitmaps_add(chain[0], "monthly")
    chainmerge.bitmaps_add(chain[2], "monthly")
    chainmerge.bitmaps_add(other, "monthly")
    chainmerge.bitmaps_repair(chain[0])
    assert names_of(chain) == [{"weekly"}, {"weekly"}, {"daily", "monthly", "weekly"}]
    passing = {one.name for one in chainmerge.bitmaps_list(other).verdicts if one.passes}
    assert passing == {"daily", "monthly"}


def test_what_is_in_use_below_a_branch_leaves_a_tombstone(
    chain: list[Path], tmp_path: Path
) -> None:
    other = create(tmp_path / "other.qcow2", backing="base.qcow2")
    chainmerge.bitmaps_add(other, "weekly")
    mark_in_use(chain[2], "weekly")
    mark_in_use(chain[2], "daily")
    report = chainmerge.bitmaps_repair(chain[0])
    assert [(one.image, one.name) for one in report.removed if one.tombstone] == [
        (str(chain[2]), "weekly")
    ]
    assert names_of(chain) == [set(), set(), {"weekly"}]
    assert not any(verdict.passes for verdict in chainmerge.bitmaps_list(other).verdicts)


def test_an_image_below_the_active_one_is_refused(chain: list[Path]) -> None:
    before = [image.read_bytes() for image in chain]
    with pytest.raises(RemovalUnsafe):
        chainmerge.bitmaps_repair(chain[1])
    assert [image.read_bytes() for image in chain] == before


def test_images_of_a_running_vm_are_refused(chain: list[Path]) -> None:
    for image in chain:
        with lock_image(image, LockMode.READER, 0), pytest.raises(ImageLocked):
            chainmerge.plan_bitmaps_repair(chain[0])


def prune_whole_chain(leaf: Path) -> None:
    chainmerge.prune(leaf, access=Access(active=str(leaf)))


@pytest.mark.parametrize("drop", [chainmerge.bitmaps_repair, prune_whole_chain])
def test_an_unfinished_merge_comes_first(chain: list[Path], drop: Callable[[Path], object]) -> None:
    """What looks broken may be saved."""
    SAVED_BITMAPS.place(chain[2]).write_text("damaged")
    before = [image.read_bytes() for image in chain]
    with pytest.raises(MergeToFinishFirst) as caught:
        drop(chain[0])
    assert "chainmerge status" in caught.value.advice
    assert [image.read_bytes() for image in chain] == before


# The command


def answered(answer: str, *arguments: str | Path) -> tuple[int, str, str]:
    """The status, standard output and standard error of a command that asks on a terminal."""
    ours, theirs = pty.openpty()
    try:
        with subprocess.Popen(
            [*cli.COMMAND, *map(str, arguments)],
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=cli.environment(),
        ) as process:
            os.write(ours, f"{answer}\n".encode())
            out, err = process.communicate(timeout=60)
        return process.returncode, out, err
    finally:
        os.close(ours)
        os.close(theirs)


def test_the_command_shows_asks_and_does(chain: list[Path]) -> None:
    status, out, err = answered("n", "bitmaps", "repair", chain[0])
    assert status == ExitCode.REFUSED
    assert "not-confirmed" in err
    assert "leaf.qcow2, middle.qcow2, base.qcow2" in err
    assert "inconsistent (in-use) in middle.qcow2" in err
    assert "from all these images. The next backup must be a full one" in " ".join(err.split())
    assert out == ""
    assert "daily" in bitmap_names(chain[0])
    status, out, err = answered("y", "bitmaps", "repair", chain[0])
    assert status == ExitCode.DONE
    assert "Dropped 1 bitmap" in out
    assert names_of(chain) == [{"weekly"}] * 3


def test_without_a_terminal_nothing_is_done_unasked(chain: list[Path]) -> None:
    ran = cli.chainmerge("bitmaps", "repair", chain[0])
    assert ran.status == ExitCode.USAGE
    assert "--yes" in ran.err
    assert cli.chainmerge("bitmaps", "repair", "-n", chain[0]).status == ExitCode.DONE
    assert "daily" in bitmap_names(chain[0])
    ran = cli.chainmerge("bitmaps", "repair", "-y", "--json", chain[0])
    assert ran.status == ExitCode.DONE
    assert [one["name"] for one in ran.json["unusable"]] == ["daily"]
    ran = cli.chainmerge("bitmaps", "repair", chain[0])
    assert ran.status == ExitCode.DONE
    assert "no bitmap of its chain needs repair" in ran.out


def test_the_listing_names_the_command(chain: list[Path]) -> None:
    said = " ".join(cli.chainmerge("bitmaps", "list", chain[0]).out.split())
    assert "chainmerge bitmaps repair LEAF" in said
