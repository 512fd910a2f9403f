# SPDX-License-Identifier: Apache-2.0
"""Overlays that were left behind, and bases that are others than they were, are not merged."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import pytest

import chainmerge
from chainmerge.merging import settling
from chainmerge.options import Access, MergeOptions
from chainmerge.planning.errors import BaseNewer
from tests.support import cli
from tests.support.loopdev import loop_device
from tests.support.qemu import content, create, qemu_img, qemu_io, run

MIB: Final = 1 << 20
HOUR: Final = 3600 * 10**9
NEWER: Final = ("base-newer",)
# What the guest has done in the overlay, and in base after somebody had merged that.
DATA: Final = ("write -P 2 0 4M", "write -P 5 0 1M")
ZEROS: Final = ("write -z 0 4M", "write -P 5 0 1M")
SCATTERED: Final = (
    " -c ".join(f"'write -P 2 {2 * n}M 192k'" for n in range(20)),
    "write -P 5 8M 64k",
)


@dataclass(frozen=True)
class Chain:
    base: Path
    top: Path
    fmt: str = "qcow2"

    @property
    def all(self) -> tuple[Path, ...]:
        return self.base, self.top

    def refusals(self, **options: object) -> tuple[str, ...]:
        plan = chainmerge.plan(self.top, self.base, options=MergeOptions(**options))  # type: ignore[arg-type]
        return tuple(refusal.code for refusal in plan.refusals)

    def doubts(self, **options: object) -> list[str]:
        plan = chainmerge.plan(self.top, self.base, options=MergeOptions(**options))  # type: ignore[arg-type]
        return [warning for warning in plan.warnings if "keeps the wrong data" in warning]


def aged(image: Path, nanoseconds: int) -> None:
    status = image.stat()
    os.utime(image, ns=(status.st_atime_ns - nanoseconds, status.st_mtime_ns - nanoseconds))


def writes(image: Path, command: str, fmt: str = "qcow2") -> None:
    qemu_io(image, *command.replace("'", "").split(" -c "), fmt=fmt)


def left_behind(directory: Path, kind: tuple[str, str], fmt: str = "qcow2") -> Chain:
    """The guest has gone on in base after a commit by somebody else; top is what it was."""
    base = create(directory / "base", 64 * MIB, fmt=fmt)
    writes(base, "write -P 1 0 48M", fmt)
    top = create(directory / "top", backing=base, backing_format=fmt)
    writes(top, kind[0])
    shutil.copy2(top, directory / "kept")
    qemu_img("commit", "-q", "-d", top)
    (directory / "kept").rename(top)
    aged(top, HOUR)
    writes(base, kind[1], fmt)
    return Chain(base, top, fmt)


class TestLeftBehind:
    @pytest.mark.parametrize(
        ("fmt", "kind"),
        [
            ("qcow2", DATA),
            ("qcow2", ZEROS),
            ("qcow2", SCATTERED),
            ("raw", DATA),
            ("raw", SCATTERED),
        ],
        ids=["data", "zeros", "scattered", "raw-data", "raw-scattered"],
    )
    def test_refused_with_nothing_changed(
        self, tmp_path: Path, kind: tuple[str, str], fmt: str
    ) -> None:
        chain = left_behind(tmp_path, kind, fmt)
        before = [image.read_bytes() for image in chain.all]
        for engine in ("native", "qemu"):
            assert chain.refusals(engine=engine) == NEWER
            ran = cli.chainmerge("merge", "--delete", "--engine", engine, chain.top)
            assert ran.status == 3
            assert "--despite-newer-base" in ran.err
        assert [image.read_bytes() for image in chain.all] == before
        assert not list(tmp_path.glob(".*"))

    def test_zeros_in_a_raw_base_prove_nothing(self, tmp_path: Path) -> None:
        """They may have been there before anybody wrote."""
        chain = left_behind(tmp_path, ZEROS, "raw")
        assert chain.refusals() == ()
        assert len(chain.doubts()) == 1

    def test_who_knows_better(self, tmp_path: Path) -> None:
        chain = left_behind(tmp_path, DATA)
        expected = content(chain.top)
        ran = cli.chainmerge("merge", "--despite-newer-base", chain.top)
        assert ran.status == 0
        assert "keeps the wrong data" in ran.out
        assert content(chain.base) == expected

    def test_a_pull_that_leaves_base(self, tmp_path: Path) -> None:
        chain = left_behind(tmp_path, DATA)
        assert chain.refusals(direction="pull") == ()
        assert len(chain.doubts(direction="pull")) == 1
        assert chain.refusals(direction="pull", delete=True) == NEWER
        assert chain.refusals(keep_name=True) == NEWER

    def test_a_range(self, tmp_path: Path) -> None:
        base = create(tmp_path / "base", 64 * MIB)
        writes(base, "write -P 1 0 48M")
        middle = create(tmp_path / "middle", backing=base)
        writes(middle, "write -P 2 0 4M")
        top = create(tmp_path / "top", backing=middle)
        writes(top, "write -P 3 2M 4M")
        qemu_img("commit", "-q", "-d", "-b", base, top)
        writes(base, "write -P 5 1M 64k")
        assert Chain(base, top).refusals() == NEWER
        with pytest.raises(BaseNewer):
            chainmerge.merge(top, base)

    def test_all_disks_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "one").mkdir()
        bad = left_behind(tmp_path / "one", DATA)
        base = create(tmp_path / "base", 4 * MIB)
        good = create(tmp_path / "top", backing=base)
        with pytest.raises(BaseNewer):
            chainmerge.merge_disks([good, bad.top])
        assert not list(tmp_path.glob(".*"))

    def test_of_volumes_it_is_said(self, tmp_path: Path) -> None:
        """They have no times, and equal content alone may have other reasons."""
        files = left_behind(tmp_path, DATA)
        with loop_device(tmp_path / "volume", 64 * MIB) as volume:
            qemu_img("convert", "-O", "qcow2", files.base, volume)
            qemu_img("rebase", "-u", "-F", "qcow2", "-b", volume, files.top)
            access = Access(allow_backing=("/dev",))
            plan = chainmerge.plan(files.top, access=access)
            assert plan.feasible
            doubts = [one for one in plan.warnings if "keeps the wrong data" in one]
            assert len(doubts) == 1
            assert "(48 of 64)" in doubts[0]
            assert "block devices have no times" in doubts[0]

    def test_a_finished_merge_is_no_matter(self, tmp_path: Path) -> None:
        """Base shows all that top shows: merged again, nothing is lost."""
        chain = left_behind(tmp_path, ("write -P 2 0 4M", "write -P 2 0 64k"))
        expected = content(chain.base)
        assert chain.refusals() == ()
        assert chain.doubts() == []
        chainmerge.merge(chain.top)
        assert content(chain.base) == expected

    def test_our_own_finished_merge(self, tmp_path: Path) -> None:
        base = create(tmp_path / "base", 16 * MIB)
        top = create(tmp_path / "top", backing=base)
        writes(top, "write -P 2 0 4M")
        chainmerge.merge(top)
        assert chainmerge.merge(top).outcome == "already-merged"


class TestOtherImages:
    def chain(self, directory: Path) -> Chain:
        base = create(directory / "base", 16 * MIB)
        writes(base, "write -P 1 0 8M")
        top = create(directory / "top", backing=base)
        writes(top, "write -P 2 2M 4M")
        return Chain(base, top)

    def test_nothing_to_be_said(self, tmp_path: Path) -> None:
        chain = self.chain(tmp_path)
        assert chain.doubts() == []
        assert chain.refusals() == ()

    def test_base_was_written(self, tmp_path: Path) -> None:
        chain = self.chain(tmp_path)
        aged(chain.top, HOUR)
        (doubt,) = chain.doubts()
        assert f"{chain.base} was written (" in doubt
        assert f") after {chain.top} (" in doubt
        assert chain.refusals() == ()
        report = chainmerge.merge(chain.top)
        assert doubt in report.warnings

    def test_base_was_replaced(self, tmp_path: Path) -> None:
        chain = self.chain(tmp_path)
        shutil.copy2(chain.base, tmp_path / "other")
        (tmp_path / "other").rename(chain.base)
        (doubt,) = chain.doubts()
        assert "was created (" in doubt
        assert "was written (" not in doubt

    def test_a_disk_that_does_not_fit(self, tmp_path: Path) -> None:
        chain = self.chain(tmp_path)
        qemu_img("resize", "-q", chain.base, "32M")
        os.utime(chain.base, ns=(0, 0))
        (doubt,) = chain.doubts()
        assert "has a larger disk (33554432 bytes)" in doubt

    def test_an_image_between(self, tmp_path: Path) -> None:
        chain = self.chain(tmp_path)
        leaf = create(tmp_path / "leaf", backing=chain.top)
        aged(leaf, HOUR)
        (doubt,) = Chain(chain.base, leaf).doubts()
        assert f"{chain.top} was written (" in doubt

    def test_a_guest_that_changes_parts_of_clusters(self, tmp_path: Path) -> None:
        """The rest of each is copied up from base, and proves nothing."""
        base = create(tmp_path / "base", 16 * MIB)
        writes(base, "write -P 1 0 16M")
        top = create(tmp_path / "top", backing=base)
        qemu_io(top, *(f"write -P 2 {64 * n}k 4k" for n in range(64)))
        aged(top, HOUR)
        assert Chain(base, top).refusals() == ()


KILLED: Final = """
import os, signal, sys
import chainmerge
from chainmerge.options import MergeOptions

def report(event):
    if event.stage == "copy" and event.done > 6 << 20:
        os.kill(os.getpid(), signal.SIGKILL)

options = MergeOptions(engine=sys.argv[2], data=sys.argv[3], bandwidth=16 << 20)
chainmerge.merge(sys.argv[1], options=options, on_progress=report)
"""
STOPPED: Final = (
    KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", "stop.append(1)")
    .replace("on_progress=report)", "on_progress=report, should_stop=lambda: bool(stop))")
    .replace("\ndef", "\nstop = []\n\ndef")
)


@pytest.mark.parametrize("program", [KILLED, STOPPED], ids=["killed", "stopped"])
@pytest.mark.parametrize(
    ("fmt", "engine", "data"),
    [
        ("qcow2", "native", "in-place"),
        ("qcow2", "native", "cow"),
        ("raw", "native", "auto"),
        ("raw", "qemu", "auto"),
        ("qcow2", "qemu", "auto"),
    ],
)
def test_a_merge_of_ours_that_was_interrupted_is_done_again(
    tmp_path: Path, fmt: str, engine: str, data: str, program: str
) -> None:
    base = create(tmp_path / "base", 32 * MIB, fmt=fmt)
    writes(base, "write -P 1 0 32M", fmt)
    top = create(tmp_path / "top", backing=base, backing_format=fmt)
    writes(top, "write -P 2 0 8M")
    writes(top, "write -P 3 16M 2M")
    expected = content(top)
    argv = [sys.executable, "-c", program, str(top), engine, data]
    ended = subprocess.run(argv, env=cli.environment(), capture_output=True, check=False)
    assert ended.returncode != 0, ended.stderr
    aged(top, HOUR)
    chain = Chain(base, top, fmt)
    assert chain.refusals(engine=engine) == ()
    half_written = base.read_bytes().count(b"\2" * 65536) > 32 and data != "cow"
    if half_written:
        # Without what was noted it could be anybody's.
        hidden = tmp_path / "hidden"
        hidden.mkdir()
        run("sh", "-c", f"mv {tmp_path}/.base.* {hidden}")
        assert chain.refusals(engine=engine) == NEWER
        run("sh", "-c", f"mv {hidden}/.base.* {tmp_path}")
    chainmerge.merge(top, options=MergeOptions(engine=engine))  # type: ignore[arg-type]
    assert content(base, fmt) == expected
    assert not list(tmp_path.glob(".base*"))


class TestMergesBelow:
    """A merge that ends under base's name makes base no newer, and no older either."""

    @staticmethod
    def with_a_root(left: Chain) -> Path:
        root = create(left.base.with_name("root"), 64 * MIB)
        middle = create(left.base.with_name("middle"), backing=root)
        qemu_img("rebase", "-q", "-u", "-b", middle, "-F", "qcow2", left.base)
        for image in (root, middle):
            aged(image, 3 * HOUR)
        return root

    @pytest.mark.parametrize("direction", ["commit", "pull"])
    def test_what_the_guest_wrote_before_it_stays_newer(
        self, tmp_path: Path, direction: str
    ) -> None:
        left = left_behind(tmp_path, DATA)
        root = self.with_a_root(left)
        assert left.refusals() == NEWER
        options = MergeOptions(delete=True, keep_name=True, direction=direction)  # type: ignore[arg-type]
        chainmerge.merge(left.base, root, options=options)
        before = content(left.base)
        assert left.refusals() == NEWER
        with pytest.raises(BaseNewer):
            chainmerge.merge(left.top, left.base)
        assert content(left.base) == before

    def test_what_the_guest_wrote_before_its_end_is_finished_stays_newer(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        left = left_behind(tmp_path, DATA)
        root = self.with_a_root(left)
        aged(left.base, 2 * HOUR)
        options = MergeOptions(delete=True, keep_name=True, direction="commit")
        merging = partial(chainmerge.merge, left.base, root, options=options)
        with monkeypatch.context() as patched:
            patched.setattr(settling, "note_deleted", lambda *_: None)
            merging()
        assert left.refusals() == ()
        qemu_io(left.base, "write -P 6 0 64k")
        assert left.refusals() == NEWER
        merging()
        assert left.refusals() == NEWER
