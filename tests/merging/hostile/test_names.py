# SPDX-License-Identifier: Apache-2.0
"""Hostile images: what they name, and what names can do."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from pathlib import Path

import pytest

from chainmerge.errors import ExitCode
from tests.chain.overlays import overlay
from tests.merging.hostile.spoiling import GARBAGE
from tests.support import qemu
from tests.support.hostile import (
    DISK,
    Victim,
    assert_civil,
    assert_refuses,
    chainmerge,
    commands,
)
from tests.support.qemu import content, create, qemu_img

# What the images name


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ('json:{"driver":"file","filename":"/etc/passwd"}', "backing-name-json"),
        ("json:", "backing-name-json"),
        ("nbd://localhost/export", "backing-name-remote"),
        ("nbd:unix:/run/socket", "backing-name-remote"),
        ("fat:rw:/etc", "backing-name-remote"),
        ("blkdebug::root.qcow2", "backing-name-remote"),
        ("/etc/passwd", "backing-file-outside"),
        ("../../../../../../../etc/passwd", "backing-file-outside"),
        ("/proc/self/mem", "backing-file-outside"),
        ("no-such-file", "backing-file-missing"),
        ("x" * 1000, "backing-file-missing"),
        ("\x1b]0;owned\x07\x1b[2J", "backing-file-missing"),
        ("a-directory", "backing-file-missing"),
        ("a-pipe", "backing-file-missing"),
        ("/dev/null", "backing-file-outside"),
        ("top.qcow2", "backing-cycle"),
        ("base.qcow2", "backing-cycle"),
        ("file:root.qcow2", "backing-name-unusable"),
    ],
)
def test_backing_names(victim: Victim, name: str, code: str) -> None:
    (victim.directory / "a-directory").mkdir()
    os.mkfifo(victim.directory / "a-pipe")
    overlay(victim.base, name.replace(",", ",,"))
    assert_refuses(victim.directory, victim.top, code)


def test_no_backing_file(victim: Victim) -> None:
    said = assert_refuses(victim.directory, victim.root, "no-backing-file", status=ExitCode.USAGE)
    assert str(victim.root) in said


def test_data_file_of_somebody_else(victim: Victim) -> None:
    secret = victim.directory / "secret"
    secret.write_bytes(b"secret" * 1000)
    victim.base.unlink()
    create(victim.base, DISK, data_file=str(victim.directory / "data"))
    shutil.move(victim.directory / "data", secret)
    (victim.directory / "data").symlink_to(secret)
    assert_refuses(victim.directory, victim.top, "data-file-refused")


@pytest.mark.parametrize(
    ("argument", "code"),
    [
        ("a-directory", "wrong-file-type"),
        ("a-pipe", "wrong-file-type"),
        ("a-socket", "wrong-file-type"),
        ("/dev/zero", "wrong-file-type"),
        ("", "wrong-file-type"),
        ("no-such-file", "image-missing"),
        ("top.qcow2\n", "image-missing"),
        ("top.qcow2/top.qcow2", "image-missing"),
        ("a-loop", "cannot-open"),
        ("n" * 300, "cannot-open"),
    ],
)
def test_arguments_that_are_no_images(victim: Victim, argument: str, code: str) -> None:
    (victim.directory / "a-directory").mkdir()
    os.mkfifo(victim.directory / "a-pipe")
    (victim.directory / "a-loop").symlink_to("a-loop")
    with socket.socket(socket.AF_UNIX) as unix, contextlib.chdir(victim.directory):
        unix.bind("a-socket")
        assert_refuses(victim.directory, Path(victim.directory, argument), code)


def test_files_that_lie_around(victim: Victim) -> None:
    """Whatever is in the images' directory, it does not stop a merge, let alone hang it."""
    directory = victim.directory
    os.mkfifo(directory / "pipe.qcow2")
    (directory / "dangling").symlink_to("nowhere")
    (directory / "loop").symlink_to("loop")
    (directory / "directory.qcow2").mkdir()
    for kind, garbage in GARBAGE.items():
        (directory / f"{kind}.qcow2").write_bytes(garbage)
    os.truncate(directory / "nothing.qcow2", 1 << 43)
    os.truncate(directory / "noise after the magic.qcow2", 1 << 43)
    ran = chainmerge("merge", victim.top)
    assert ran.status == ExitCode.DONE, ran
    # A long path is broken over lines, at any place.
    assert "noiseafterthemagic.qcow2" in "".join(ran.out.split())


@pytest.mark.parametrize("role", ["base", "top"])
def test_names_to_which_nothing_can_be_added(victim: Victim, role: str) -> None:
    """A file name has at most 255 bytes, and files of ours stand beside the images."""
    long = victim.image(role).rename(victim.directory / ("n" * 255))
    top = long if role == "top" else victim.top
    if role == "base":
        qemu_img("rebase", "-u", "-F", "qcow2", "-b", long.name, top)
    expected = content(top)
    assert chainmerge("merge", "--delete", top).status == ExitCode.DONE
    assert content(long if role == "base" else victim.base) == expected
    again = chainmerge("merge", "--delete", top)
    assert again.status == ExitCode.DONE, again


# What they have people's terminals do


def test_names_that_drive_a_terminal(victim: Victim) -> None:
    names = ("\x1b[2J\x1b]0;owned\x07", "line\nchainmerge: forged", "\u202ereversed", "\x9b31m")
    for image in (victim.base, victim.top):
        for name in names:
            qemu_img("bitmap", "--add", image, name)
    directory = victim.directory.rename(victim.directory.with_name("\x1b[31mimages\n"))
    moved = Victim(directory)
    qemu_img("bitmap", "--add", moved.base, "\x1b[stale")
    more = (("bitmaps", "list", "--json"), ("bitmaps", "prune"), ("repair", "--yes"))
    for command in (*commands(moved.top), *((*each, str(moved.top)) for each in more)):
        ran = chainmerge(*command)
        assert ran.status == ExitCode.DONE
        assert_civil(ran)
    assert set(names) < set(qemu.bitmap_names(moved.base))
