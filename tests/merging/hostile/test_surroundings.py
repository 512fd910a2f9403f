# SPDX-License-Identifier: Apache-2.0
"""Hostile surroundings: who else is there, what the storage is like, what lies beside."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from chainmerge.errors import ExitCode
from chainmerge.records.saved_bitmaps import saved_bitmaps_file
from tests.merging.hostile.spoiling import ROLES
from tests.support.hostile import (
    NO_WAITING,
    Victim,
    assert_civil,
    assert_refuses,
    chainmerge,
)
from tests.support.images import KIB, MIB
from tests.support.loopdev import loop_device, mounted_file_system, mounted_tmpfs
from tests.support.qemu import create, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


# Who else is there


def test_base_with_another_child(victim: Victim) -> None:
    other = create(victim.directory / "other.qcow2", backing=victim.base.name)
    said = assert_refuses(victim.directory, victim.top, "base-has-other-children")
    assert str(other) in said


@contextlib.contextmanager
def held_by_qemu(image: Path, *options: str) -> Iterator[int]:
    """A qemu-io that has the image, and the images below, open; its process id."""
    command = ["qemu-io", *options, "-f", "qcow2", str(image)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("length\n")
        process.stdin.flush()
        # What it prints tells that it has come to open the images.
        while "MiB" not in (line := process.stdout.readline()):
            assert line, "qemu-io has ended"
        try:
            yield process.pid
        finally:
            process.stdin.close()


@pytest.mark.parametrize(
    ("role", "options", "named"),
    [
        ("base", (), "base"),
        ("base", ("-r",), "base"),
        ("top", (), "base"),
        ("top", ("-r",), "base"),
        ("root", (), "root"),
    ],
)
def test_images_that_qemu_has_open(
    victim: Victim, role: str, options: tuple[str, ...], named: str
) -> None:
    with held_by_qemu(victim.image(role), *options) as pid:
        said = assert_refuses(victim.directory, victim.top, "image-locked")
        assert f"{victim.image(named)}: is in use by qemu-io (pid {pid})" in said
    assert chainmerge("merge", *NO_WAITING, victim.top).status == ExitCode.DONE


def test_child_that_qemu_has_open(victim: Victim) -> None:
    """Only the overlay above is in use for writing; it would have to be re-pointed."""
    child = create(victim.directory / "child.qcow2", backing=victim.top.name)
    # As a virtual machine whose chain is locked on another host.
    options = json.dumps({"driver": "qcow2", "backing": None, "file.filename": str(child)})
    with subprocess.Popen(
        ["qemu-io", f"json:{options}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("length\n")
        process.stdin.flush()
        while "MiB" not in process.stdout.readline():
            pass
        said = assert_refuses(victim.directory, victim.top, "image-locked")
        assert f"{child}: is in use by qemu-io (pid {process.pid})" in said
        process.stdin.close()


# What the storage is like


def test_file_that_may_not_be_changed(template: Victim, tmp_path: Path) -> None:
    with mounted_file_system(tmp_path, "ext4", 8 * MIB) as mounted:
        victim = template.copy_to(mounted / "images")
        run("chattr", "+i", victim.base)
        try:
            said = assert_refuses(victim.directory, victim.top, "image-read-only")
        finally:
            run("chattr", "-i", victim.base)
        assert str(victim.base) in said


def test_directory_that_takes_no_new_files(template: Victim, tmp_path: Path) -> None:
    """Base can be written, but nothing that a rerun has to know can be noted beside it."""
    with mounted_file_system(tmp_path, "ext4", 8 * MIB) as mounted:
        victim = template.copy_to(mounted / "images")
        before = [victim.image(role).read_bytes() for role in ROLES]
        run("chattr", "+i", victim.directory)
        try:
            for engine in ("qemu", "native"):
                ran = chainmerge("merge", "--engine", engine, victim.top)
                assert_civil(ran)
                assert ran.status == ExitCode.REFUSED
                assert "state-directory-unusable" in ran.err
                assert str(victim.directory) in ran.err
                assert [victim.image(role).read_bytes() for role in ROLES] == before
        finally:
            run("chattr", "-i", victim.directory)
        ran = chainmerge("merge", victim.top)
        assert ran.status == ExitCode.DONE, ran


def test_file_system_that_is_read_only(template: Victim, tmp_path: Path) -> None:
    with mounted_file_system(tmp_path, "ext4", 8 * MIB) as mounted:
        victim = template.copy_to(mounted / "images")
        run("mount", "-o", "remount,ro", mounted)
        said = assert_refuses(victim.directory, victim.top, "image-read-only")
        assert f"{victim.base}: cannot be written: Read-only file system" in said


def test_device_that_is_read_only(victim: Victim) -> None:
    behind = victim.directory / "behind"
    victim.base.rename(behind)
    with loop_device(behind, 4 * MIB, "--read-only") as device:
        victim.base.symlink_to(device)
        allowed = ("--allow-backing", device)
        said = assert_refuses(victim.directory, victim.top, "image-read-only", options=allowed)
        assert "set read-only" in said


@pytest.mark.parametrize("spare", [0, 64 * KIB])
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_full_file_system(template: Victim, tmp_path: Path, kind: str, spare: int) -> None:
    size = 4 * MIB
    mounting = (
        mounted_tmpfs(tmp_path, size)
        if kind == "tmpfs"
        else mounted_file_system(tmp_path, kind, size)
    )
    with mounting as mounted:
        victim = template.copy_to(mounted / "images")
        _fill(mounted / "filler", spare)
        said = assert_refuses(victim.directory, victim.top, "file-system-full")
        assert re.search(r"its\s+file\s+system\s+lacks\s+\d+\s+bytes", said)
        (mounted / "filler").unlink()
        assert chainmerge("merge", victim.top).status == ExitCode.DONE


def _fill(filler: Path, spare: int) -> None:
    """Leave no more than *spare* bytes of a file system free."""
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4 * KIB))
    os.sync()
    os.truncate(filler, max(0, filler.stat().st_size - spare))


# What else may stand beside an image


@pytest.mark.parametrize("kind", ["noise", "cut off", "a directory", "nonsense of the right form"])
def test_saved_bitmaps_that_are_none(victim: Victim, kind: str) -> None:
    saved = saved_bitmaps_file(victim.base)
    if kind == "a directory":
        saved.mkdir()
    else:
        document = b'chainmerge saved bitmaps 1\n{"bitmaps": 7}\n'
        whole = document + hashlib.sha256(document).digest()
        contents = {"noise": b"noise" * 100, "cut off": whole[:-1]}
        saved.write_bytes(contents.get(kind, whole))
    codes = {"saved-bitmaps-damaged", "wrong-file-type"}
    assert str(saved) in assert_refuses(victim.directory, victim.top, *codes)
