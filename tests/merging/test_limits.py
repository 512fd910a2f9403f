# SPDX-License-Identifier: Apache-2.0
"""Full file systems, quotas, limits of the process, images that change under a merge, clocks."""

from __future__ import annotations

import ast
import contextlib
import os
import shutil
import subprocess
import time
from typing import TYPE_CHECKING, Final

import pytest

import chainmerge
from chainmerge.documents.progress import Stage
from chainmerge.errors import ChainmergeError, ExitCode
from chainmerge.options import MergeOptions
from tests.conftest import SOAK
from tests.merging.test_faults import Images, build, chain_of, checkpoints_of, is_qcow2
from tests.support.cli import COMMAND, SOURCES, Ran, environment
from tests.support.cli import chainmerge as chainmerge_process
from tests.support.images import KIB, MIB, Write, apply_writes
from tests.support.loopdev import mounted_file_system
from tests.support.qemu import check, content, create, run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from chainmerge.documents.progress import ProgressEvent


@pytest.fixture
def images(tmp_path: Path) -> Images:
    return build(tmp_path / "images", "file")


def limited(limit: str, *arguments: str | Path) -> Ran:
    """A command under a limit of prlimit(1)."""
    command = ["prlimit", limit, *COMMAND, *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, check=False, env=environment(), timeout=120)
    return Ran(ran.returncode, ran.stdout.decode(), ran.stderr.decode())


def assert_whole(images: Images, expected: bytes) -> None:
    assert content(images.leaf) == expected
    for image in chain_of(images.leaf):
        if is_qcow2(image):
            assert check(image)["corruptions"] == 0, image


def assert_civil(ran: Ran) -> None:
    assert ran.status in set(ExitCode), ran
    assert "Traceback" not in ran.err, ran
    assert "internal error" not in ran.err, ran


# Limits of the process


@pytest.mark.parametrize("engine", ["native", "qemu"])
@pytest.mark.parametrize("beyond", [4 * KIB, 100 * KIB])
def test_files_that_must_not_grow(images: Images, engine: str, beyond: int) -> None:
    """RLIMIT_FSIZE: the kernel sends SIGXFSZ, which ends programs that do not see to it."""
    expected = content(images.leaf)
    before = images.middle.read_bytes()
    merging = ("merge", "--engine", engine, images.top)
    ran = limited(f"--fsize={len(before) + beyond}", *merging)
    assert_civil(ran)
    assert ran.status == ExitCode.FAILED
    assert_whole(images, expected)
    if engine == "native":
        # What is free may have been used for a while.
        assert images.middle.stat().st_size == len(before)
        assert images.middle.read_bytes()[: 4 * KIB] == before[: 4 * KIB]
    assert limited("--fsize=unlimited", *merging).status == ExitCode.DONE
    assert_whole(images, expected)


# What the interpreter needs before it can say anything is more than the least of these.
MEMORY: Final = (110, 125, 130, 135, 140, 145, 150, 160, 170, 200)


@pytest.mark.parametrize("megabytes", MEMORY if SOAK else MEMORY[1::4])
def test_little_memory(images: Images, megabytes: int) -> None:
    expected = content(images.leaf)
    checkpoints = checkpoints_of(images.leaf)
    ran = limited(f"--as={megabytes * 1000 * 1000}", "merge", "--delete", images.top)
    # OpenBLAS ends the process by itself where it cannot have its buffers.
    if "OpenBLAS" not in ran.err:
        assert_civil(ran)
    if ran.status == ExitCode.FAILED and "OpenBLAS" not in ran.err:
        assert "not enough memory" in ran.err
    assert_whole(images, expected)
    assert limited("--as=unlimited", "merge", "--delete", images.top).status == ExitCode.DONE
    assert_whole(images, expected)
    assert checkpoints_of(images.leaf) == checkpoints


# File systems that are full


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_file_system_that_is_full(tmp_path: Path, kind: str) -> None:
    """A sparse base has to grow. It is refused before anything is written."""
    size = 24 * MIB if kind == "ext4" else 320 * MIB
    with mounted_file_system(tmp_path, kind, size) as place:
        base = create(place / "base", 64 * MIB)
        top = create(tmp_path / "top", backing=base)
        apply_writes(top, [Write(number * 256 * KIB, 128 * KIB) for number in range(40)])
        expected = content(top)
        room = os.statvfs(place)
        filler = place / "filler"
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - 2 * MIB)
        before, blocks = base.read_bytes(), base.stat().st_blocks
        merging = ("merge", "--allow-backing", place, "--sole-user", top)
        ran = chainmerge_process(*merging)
        assert_civil(ran)
        assert ran.status == ExitCode.REFUSED
        assert "file-system-full" in ran.err
        assert (base.read_bytes(), base.stat().st_blocks) == (before, blocks)
        filler.unlink()
        assert chainmerge_process(*merging).status == ExitCode.DONE
        assert content(base) == expected


def test_a_quota(tmp_path: Path) -> None:
    """Of the file systems whose quotas hold for root, too, this is one that kernels mostly have."""
    with mounted_file_system(tmp_path, "btrfs", 256 * MIB) as mounted:
        place = mounted / "limited"
        run("btrfs", "subvolume", "create", place)
        run("btrfs", "quota", "enable", mounted)
        base = create(place / "base", 64 * MIB)
        top = create(tmp_path / "top", backing=base)
        apply_writes(top, [Write(0, 8 * MIB)])
        run("btrfs", "qgroup", "limit", "4M", place)
        before, expected = base.read_bytes(), content(top)
        merging = ("merge", "--allow-backing", place, "--sole-user", top)
        ran = chainmerge_process(*merging)
        assert_civil(ran)
        assert ran.status == ExitCode.REFUSED
        assert base.read_bytes() == before
        run("btrfs", "qgroup", "limit", "none", place)
        assert chainmerge_process(*merging).status == ExitCode.DONE
        assert content(base) == expected


# Images that change under a merge


def _truncated(path: Path) -> None:
    os.truncate(path, 8 * KIB)


def _grown(path: Path) -> None:
    os.truncate(path, path.stat().st_size + MIB)


def _gone(path: Path) -> None:
    path.unlink()


def _replaced(path: Path) -> None:
    shutil.copyfile(path, path.with_name("copy"))
    path.with_name("copy").rename(path)


def _linked(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("victim"))


CHANGES: Final = (_truncated, _grown, _gone, _replaced, _linked)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize("role", ["middle", "top", "leaf"])
def test_images_that_change_under_a_merge(
    images: Images, role: str, change: Callable[[Path], None]
) -> None:
    """Locks keep QEMU away, and nobody else. Whatever stands under the name is not written to."""
    victim = images.directory / "victim"
    victim.write_bytes(b"something else" * 1000)
    for stage in (Stage.LOCK, Stage.PLAN, Stage.COPY, Stage.VERIFY, Stage.SETTLE):
        scene = images.directory.with_name(f"{role}-{stage}")
        shutil.copytree(images.directory, scene)
        path = scene / role
        left = _merged_while(scene / "top", stage, path, change)
        assert (scene / "victim").read_bytes() == victim.read_bytes()
        if change in (_replaced, _linked) and stage is not Stage.LOCK:
            assert path.read_bytes() == left


def _merged_while(top: Path, stage: Stage, path: Path, change: Callable[[Path], None]) -> bytes:
    """Merge; returns what there was after the change, which comes at the beginning of a stage."""
    after: list[bytes] = []

    def strike(event: ProgressEvent) -> None:
        if event.stage is stage and not after:
            change(path)
            after.append(path.read_bytes() if path.exists() else b"")

    # However it ends, it is not by an error that is none of ours.
    with contextlib.suppress(ChainmergeError):
        chainmerge.merge(top, options=MergeOptions(data="cow"), on_progress=strike)
    (left,) = after
    return left


def test_what_replaces_an_image_has_its_owner_and_permissions(images: Images) -> None:
    os.chown(images.top, 1234, 2345)
    images.top.chmod(0o640)
    images.middle.chmod(0o444)
    chainmerge.merge(images.top, options=MergeOptions(keep_name=True, direction="commit"))
    status = images.top.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (1234, 2345, 0o640)


# Clocks


def test_clocks_that_jump(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is decided by the time of day: neither by the clock nor by the times of files."""
    expected = content(images.leaf)
    days = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: (-1) ** next(days) * 1e9 * next(days))
    for number, path in enumerate((images.base, images.middle, images.top, images.leaf)):
        os.utime(path, (0, 0) if number % 2 else (4e9, 4e9))
    chainmerge.merge(images.top, images.base)
    assert_whole(images, expected)


PACKAGE: Final = SOURCES / "chainmerge"
# They say how old images are, and when a page or a line of the history was written, which nothing
# but the clock tells.
ASK_THE_CLOCK: Final = (
    PACKAGE / "inventory",
    PACKAGE / "cli" / "merge_pictures.py",
    PACKAGE / "merging" / "noting.py",
)


def test_no_module_that_merges_asks_for_the_time_of_day() -> None:
    for path in SOURCES.rglob("*.py"):
        if any(path.is_relative_to(one) for one in ASK_THE_CLOCK):
            continue
        names = {
            f"{node.value.id}.{node.attr}"
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        asked = names & {
            "time.time",
            "time.time_ns",
            "datetime.now",
            "datetime.utcnow",
            "date.today",
        }
        assert not asked, (path, asked)
