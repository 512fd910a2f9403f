# SPDX-License-Identifier: Apache-2.0
"""Broken images and hostile ones: every command says what is wrong, and nothing is changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from chainmerge.errors import ExitCode
from chainmerge.records.saved_bitmaps import saved_bitmaps_file
from tests.chain.overlays import overlay
from tests.chain.unchanged import unchanged
from tests.support import qemu
from tests.support.cli import environment
from tests.support.hostile import (
    CLUSTER,
    DISK,
    NO_WAITING,
    Victim,
    assert_civil,
    assert_refuses,
    build,
    chainmerge,
    commands,
)
from tests.support.images import KIB, MIB
from tests.support.loopdev import loop_device, mounted_file_system, mounted_tmpfs
from tests.support.qemu import assert_clean, content, create, qemu_img, run
from tests.support.surgery import (
    AUTOCLEAR,
    BACKING_LENGTH,
    BACKING_OFFSET,
    CLUSTER_BITS,
    COMPRESSION_TYPE,
    CRYPT_METHOD,
    HEADER_LENGTH,
    INCOMPATIBLE,
    L1_OFFSET,
    L1_SIZE,
    REFCOUNT_CLUSTERS,
    REFCOUNT_OFFSET,
    REFCOUNT_ORDER,
    SNAPSHOT_COUNT,
    SNAPSHOTS_OFFSET,
    VERSION,
    VIRTUAL_SIZE,
    Field,
    get_bytes,
    put_bytes,
)
from tests.support.wounds import OVERLAPS, WOUNDS, Anatomy, inflict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROLES: Final = ("root", "base", "top")
FORMAT_ERRORS: Final = {
    "not-qcow2",
    "bad-header",
    "bad-offset",
    "bad-table-entry",
    "bad-refcount-table",
    "bad-snapshot-table",
    "bad-bitmap-directory",
    "bad-bitmap-table",
    "unreadable-bitmap",
    "image-damaged",
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    return build(tmp_path_factory.mktemp("hostile") / "images")


@pytest.fixture
def victim(template: Victim, tmp_path: Path) -> Victim:
    return template.copy_to(tmp_path / "images")


def test_the_victim_merges_when_nothing_is_wrong(victim: Victim) -> None:
    expected = content(victim.top)
    ran = chainmerge("merge", victim.top)
    assert ran.status == ExitCode.DONE, ran
    assert content(victim.base) == expected


# What is in the files


@pytest.mark.parametrize("role", ROLES)
def test_truncated_files(victim: Victim, role: str) -> None:
    path = victim.image(role)
    whole = path.read_bytes()
    ends = [0, 1, 4, 71, 72, 103, 104, 111, 512, CLUSTER - 1, CLUSTER, len(whole) - 1]
    chance = random.Random(role)
    ends += [
        cluster * CLUSTER + beyond
        for cluster in chance.sample(range(1, len(whole) // CLUSTER), 8)
        for beyond in (0, 700)
    ]
    for end in ends:
        os.truncate(path, end)
        codes = FORMAT_ERRORS | {"wrong-format", "image-format-unknown"}
        assert str(path) in assert_refuses(victim.directory, victim.top, *codes), end
        path.write_bytes(whole)


GARBAGE: Final = {
    "nothing": b"",
    "zeros": bytes(64 * KIB),
    "noise": random.Random(1).randbytes(64 * KIB),
    "text": b"Lorem ipsum\n" * 1000,
    "only the magic": b"QFI\xfb",
    "noise after the magic": b"QFI\xfb\0\0\0\3" + random.Random(2).randbytes(64 * KIB),
    "version 1": b"QFI\xfb\0\0\0\1" + bytes(64 * KIB),
}


@pytest.mark.parametrize("kind", GARBAGE)
@pytest.mark.parametrize("role", ROLES)
def test_garbage(victim: Victim, role: str, kind: str) -> None:
    victim.image(role).write_bytes(GARBAGE[kind])
    codes = {"wrong-format", "image-format-unknown", "not-qcow2", "bad-header"}
    assert str(victim.image(role)) in assert_refuses(victim.directory, victim.top, *codes)


@pytest.mark.parametrize("fmt", ["vmdk", "qed", "qcow"])
def test_images_of_another_format(victim: Victim, fmt: str) -> None:
    victim.base.unlink()
    create(victim.base, DISK, fmt=fmt)
    assert_refuses(victim.directory, victim.top, "wrong-format", "bad-header")
    overlay(victim.top, victim.base.name, fmt)
    assert fmt in assert_refuses(victim.directory, victim.top, "foreign-format")


LARGEST: Final = {4: 2**32 - 1, 8: 2**64 - 1, 1: 255}
OUT_OF_RANGE: Final[dict[Field, tuple[int, ...]]] = {
    VERSION: (0, 1, 4),
    BACKING_OFFSET: (1, 8, 103, 4097, 1 << 20, 1 << 63),
    BACKING_LENGTH: (1024, 4097),
    CLUSTER_BITS: (0, 8, 11, 13, 22, 63),
    VIRTUAL_SIZE: (1, DISK + 1, 1 << 40, 1 << 56, 1 << 62, 1 << 63, 2**64 - 512),
    CRYPT_METHOD: (2, 3),
    L1_SIZE: (0, 1 << 22, (1 << 22) + 1),
    L1_OFFSET: (0, 1, 512, 1 << 22, 1 << 56, 1 << 63, 2**64 - CLUSTER),
    REFCOUNT_OFFSET: (0, 1, 1 << 22, 1 << 63, 2**64 - CLUSTER),
    REFCOUNT_CLUSTERS: (0, 100, 2049),
    SNAPSHOT_COUNT: (1, 65536, 65537),
    SNAPSHOTS_OFFSET: (1,),
    INCOMPATIBLE: (4, 8, 16, 32, 1 << 63),
    AUTOCLEAR: (2,),
    REFCOUNT_ORDER: (7, 255),
    HEADER_LENGTH: (0, 72, 103, 105, CLUSTER + 1, 2 * CLUSTER),
    COMPRESSION_TYPE: (1, 2),
}


@pytest.mark.parametrize("field", OUT_OF_RANGE, ids=lambda field: field.name)
@pytest.mark.parametrize("role", ROLES[1:])
def test_header_fields_out_of_range(victim: Victim, role: str, field: Field) -> None:
    path = victim.image(role)
    right = field.get(path)
    codes = FORMAT_ERRORS | {"bad-header-extension", "unsupported-feature", "data-file-refused"}
    for value in (*OUT_OF_RANGE[field], LARGEST[field.width]):
        field.put(path, value)
        assert str(path) in assert_refuses(victim.directory, victim.top, *codes), value
    field.put(path, right)


@pytest.mark.parametrize("wound", WOUNDS)
@pytest.mark.parametrize("role", ROLES)
def test_damaged_tables(victim: Victim, role: str, wound: str) -> None:
    path = victim.image(role)
    inflict(path, WOUNDS[wound])
    assert str(path) in assert_refuses(victim.directory, victim.top, *FORMAT_ERRORS)


@pytest.mark.parametrize("wound", OVERLAPS)
@pytest.mark.parametrize("role", ROLES[1:])
def test_overlapping_tables(victim: Victim, role: str, wound: str) -> None:
    path = victim.image(role)
    inflict(path, OVERLAPS[wound])
    with unchanged(victim.directory):
        ran = chainmerge("merge", victim.top)
    assert ran.status == ExitCode.REFUSED
    assert f"{path} is damaged (" in ran.err
    assert_civil(ran)
    assert chainmerge("check", path).status == ExitCode.FAILED


@pytest.mark.parametrize("wound", WOUNDS | OVERLAPS)
def test_nothing_is_written_to_a_damaged_image(victim: Victim, wound: str) -> None:
    """Except where it is the bitmaps that are broken, and the image is whole without them."""
    inflict(victim.base, (WOUNDS | OVERLAPS)[wound])
    damaged = victim.base.read_bytes()
    for command in (("repair", "--yes"), ("bitmaps", "clear", "--force")):
        ran = chainmerge(*command, victim.base)
        assert_civil(ran)
        if victim.base.read_bytes() != damaged:
            # Where two places have the same data, one of them has lost its own.
            mended = ExitCode.FAILED if "lost-data" in ran.out else ExitCode.DONE
            assert ran.status == mended
            assert qemu.check(victim.base)["corruptions"] == 0
            victim.base.write_bytes(damaged)


def test_compressed_data_that_is_none(victim: Victim) -> None:
    """It is found when it is read, in the middle of the copy. Top still has the right content."""
    anatomy = Anatomy(victim.top)
    place = anatomy.number(anatomy.compressed[0]) & ((1 << 58) - 1)
    put_bytes(victim.top, place, b"\xff" * 300)
    before = victim.top.read_bytes()
    for _ in range(2):
        ran = chainmerge("merge", victim.top)
        assert_civil(ran)
        assert ran.status == ExitCode.FAILED
        assert "is untouched" in ran.err
        assert f"{victim.top}: compressed cluster at offset" in ran.err
        assert victim.top.read_bytes() == before
        assert qemu.check(victim.base)["corruptions"] == 0


@st.composite
def wounds(draw: st.DrawFn, size: int) -> tuple[int, bytes]:
    """A few bytes anywhere, mostly in the first clusters, where the tables are."""
    offset = draw(st.one_of(st.integers(0, 8 * CLUSTER), st.integers(0, size - 1)))
    if draw(st.booleans()):
        place = draw(st.integers(0, size // CLUSTER)) * CLUSTER | draw(
            st.sampled_from((0, 1 << 63))
        )
        return offset // 8 * 8, place.to_bytes(8)
    return offset, draw(st.binary(min_size=1, max_size=8))


@given(st.data(), st.sampled_from(ROLES))
def test_random_damage(template: Victim, data: st.DataObject, role: str) -> None:
    """A merge refuses and changes nothing, or base is what QEMU saw of top before, and sound."""
    with tempfile.TemporaryDirectory() as scratch:
        victim = template.copy_to(Path(scratch) / "images")
        path = victim.image(role)
        for offset, bytes_ in data.draw(st.lists(wounds(path.stat().st_size), min_size=1)):
            put_bytes(path, offset, bytes_)
        before = {each: victim.image(each).read_bytes() for each in ROLES}
        for command in list(commands(victim.top))[:-1]:
            assert_civil(chainmerge(*command))
        expected = _content_if_any(victim.top)
        ran = chainmerge("merge", victim.top)
        assert_civil(ran)
        event(f"status {ran.status}")
        if ran.status == ExitCode.DONE:
            assert_clean(victim.base)
            assert expected is None or content(victim.base).startswith(expected)
        elif ran.status == ExitCode.REFUSED:
            assert {each: victim.image(each).read_bytes() for each in ROLES} == before
        else:
            # Compressed data is looked at when it is copied.
            assert "compressed cluster at offset" in ran.err or "leak" in ran.err, ran
            assert victim.top.read_bytes() == before["top"]


def _content_if_any(image: Path) -> bytes | None:
    try:
        return content(image)
    except qemu.ToolFailed:
        return None


def test_clusters_that_are_in_use_behind_the_end_of_the_file(victim: Victim) -> None:
    """A writer that died has raised refcounts and not come to write the clusters."""
    block = Anatomy(victim.base).refcount_block
    behind = victim.base.stat().st_size // CLUSTER + 5
    put_bytes(victim.base, block + 2 * behind, b"\0\1" * 3)
    assert_clean(victim.base)
    assert chainmerge("merge", victim.top).status == ExitCode.DONE
    assert_clean(victim.base)


def test_refcounts_that_a_killed_writer_did_not_lower(victim: Victim) -> None:
    """Of an image with internal snapshots, as QEMU leaves it: too high by one, not COPIED."""
    anatomy = Anatomy(victim.base)
    entry = anatomy.number(anatomy.data[0])
    put_bytes(victim.base, anatomy.data[0], (entry & ~(1 << 63)).to_bytes(8))
    place = anatomy.refcount_block + 2 * ((entry & ~(1 << 63)) // CLUSTER)
    put_bytes(victim.base, place, b"\0\2")
    assert qemu.check(victim.base)["leaks"] == 1
    expected = content(victim.top)
    ran = chainmerge("merge", victim.top)
    assert ran.status == ExitCode.DONE, ran
    assert "`chainmerge repair`" in ran.out
    assert content(victim.base) == expected
    assert chainmerge("repair", "--yes", victim.base).status == ExitCode.DONE
    assert content(victim.base) == expected
    assert_clean(victim.base)


@pytest.mark.parametrize("code", ["image-dirty", "image-corrupt"])
def test_base_that_was_not_closed(victim: Victim, code: str) -> None:
    INCOMPATIBLE.put(victim.base, 1 if code == "image-dirty" else 2)
    said = assert_refuses(victim.directory, victim.top, code)
    assert f"`chainmerge repair {victim.base}`" in said


@pytest.mark.parametrize("role", ROLES)
def test_encrypted_images(victim: Victim, role: str) -> None:
    """Also below base: QEMU opens all of the chain, and cannot without a key."""
    path = victim.image(role)
    CRYPT_METHOD.put(path, 1)
    said = assert_refuses(victim.directory, victim.top, "image-encrypted")
    assert str(path) in said


@pytest.mark.parametrize("kind", ["raw", "version 2"])
def test_base_that_cannot_hold_bitmaps(tmp_path: Path, kind: str) -> None:
    directory = tmp_path / "images"
    directory.mkdir()
    base = directory / "base"
    if kind == "raw":
        create(base, DISK, fmt="raw")
    else:
        create(base, DISK, compat="0.10")
    top = create(
        directory / "top", backing="base", backing_format="raw" if kind == "raw" else "qcow2"
    )
    for name in ("monday", "tuesday"):
        qemu_img("bitmap", "--add", top, name)
    said = assert_refuses(directory, top, "base-cannot-hold-bitmaps")
    assert "monday" in said
    assert "tuesday" in said
    assert "--drop-bitmaps" in said


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


# How much they make us take

MEMORY_LIMIT: Final = 2 << 30
MOST_RESIDENT: Final = 400 * MIB
# Run where memory is limited; tells the statuses and how much memory was in use at most.
_COMMANDS_IN_LITTLE_MEMORY: Final = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
from chainmerge.cli.main import run
image = sys.argv[2]
commands = [["plan"], ["measure"], ["info"], ["check"], ["bitmaps", "list"]]
commands += [["repair", "--dry-run"], ["merge"]]
found = {" ".join(command): run([*command, "--json", image]) for command in commands}
# Not ru_maxrss: that begins with what the process that started this one had.
peak = 1024 * next(
    int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:")
)
print("\\n" + json.dumps([found, peak]))
"""


def _huge_disk(victim: Victim) -> None:
    victim.top.unlink()
    create(victim.top, 1 << 51, backing=victim.base.name)


def _l1_table_of_32_mib(victim: Victim) -> None:
    end = _end_of(victim.top)
    os.truncate(victim.top, end + (32 << 20))
    L1_SIZE.put(victim.top, 4 << 20)
    L1_OFFSET.put(victim.top, end)


def _refcount_table_of_8_mib(victim: Victim) -> None:
    end = _end_of(victim.base)
    entries = get_bytes(victim.base, REFCOUNT_OFFSET.get(victim.base), CLUSTER)
    put_bytes(victim.base, end, entries)
    os.truncate(victim.base, end + (8 << 20))
    REFCOUNT_OFFSET.put(victim.base, end)
    REFCOUNT_CLUSTERS.put(victim.base, 2048)


def _sparse_base(victim: Victim) -> None:
    os.truncate(victim.base, 1 << 42)


def _sparse_top(victim: Victim) -> None:
    os.truncate(victim.top, 1 << 43)


def _raw_base_of_8_tib(victim: Victim) -> None:
    victim.base.write_bytes(b"x")
    os.truncate(victim.base, 1 << 43)
    overlay(victim.top, victim.base.name, "raw")


def _many_bitmaps(victim: Victim) -> None:
    """All with the same table, as if the directory of 64 MiB that the format allows were there."""
    anatomy = Anatomy(victim.top)
    table = anatomy.bitmaps[0]
    names = [b"%d" % number for number in range(5000)]
    entries = [
        struct.pack(">QIIBBHI", table.table_offset, table.table_size, 2, 1, 9, len(name) + 900, 0)
        + name.ljust(len(name) + 900, b"x")
        for name in names
    ]
    directory = b"".join(entry + bytes(-len(entry) % 8) for entry in entries)
    end = _end_of(victim.top)
    put_bytes(victim.top, end, directory)
    header = struct.pack(">IIQQ", len(names), 0, len(directory), end)
    put_bytes(victim.top, anatomy.extension, header)


def _many_snapshots(victim: Victim) -> None:
    """65,536 of them, each with an L1 table of 32 MiB, which is the same one."""
    end = _end_of(victim.base)
    size = struct.pack(">QQ", 0, DISK)
    l1_table = end + (8 << 20)
    entry = struct.pack(">QIHHIIQII", l1_table, 4 << 20, 1, 1, 0, 0, 0, 0, 16) + size + b"ab"
    put_bytes(victim.base, end, entry.ljust(64, b"\0") * 65536)
    os.truncate(victim.base, l1_table + (32 << 20))
    SNAPSHOT_COUNT.put(victim.base, 65536)
    SNAPSHOTS_OFFSET.put(victim.base, end)


def _end_of(path: Path) -> int:
    size = path.stat().st_size
    return size + -size % CLUSTER


@pytest.mark.parametrize(
    "claim",
    [
        _huge_disk,
        _l1_table_of_32_mib,
        _refcount_table_of_8_mib,
        _sparse_base,
        _sparse_top,
        _raw_base_of_8_tib,
        _many_bitmaps,
        _many_snapshots,
    ],
)
def test_huge_claims_take_little_memory(victim: Victim, claim: Callable[[Victim], None]) -> None:
    claim(victim)
    script = [sys.executable, "-c", _COMMANDS_IN_LITTLE_MEMORY]
    ran = subprocess.run(
        [*script, str(MEMORY_LIMIT), str(victim.top)],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
        timeout=120,
    )
    assert "internal-error" not in ran.stdout
    assert "MemoryError" not in ran.stdout + ran.stderr
    statuses, peak = json.loads(ran.stdout.splitlines()[-1])
    assert set(statuses.values()) <= {ExitCode.DONE, ExitCode.FAILED, ExitCode.REFUSED}, statuses
    assert peak < MOST_RESIDENT
