# SPDX-License-Identifier: Apache-2.0
"""Hostile and broken input: refused in words, with nothing changed, by every command."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest

from chainmerge.errors import ExitCode
from chainmerge.storage.locks import LockMode, lock_image
from tests.chain.unchanged import unchanged
from tests.support.hostile import Victim, assert_civil, assert_refuses, build, chainmerge, commands
from tests.support.loopdev import loop_device, mounted_file_system
from tests.support.qemu import create, info, qemu_img, qemu_io

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    return build(tmp_path_factory.mktemp("victim") / "chain")


@pytest.fixture
def victim(template: Victim, tmp_path: Path) -> Victim:
    return template.copy_to(tmp_path / "chain")


def _patch(image: Path, offset: int, data: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def _number(image: Path, offset: int) -> int:
    return int(struct.unpack_from(">Q", image.read_bytes(), offset)[0])


# Header fields of the specification: offset, struct code, a value out of range.
FIELDS = {
    "magic": (0, ">I", 0x12345678),
    "version": (4, ">I", 99),
    "backing name offset": (8, ">Q", 1 << 40),
    "backing name length": (16, ">I", 1 << 20),
    "cluster_bits too small": (20, ">I", 3),
    "cluster_bits too large": (20, ">I", 60),
    "virtual size": (24, ">Q", (1 << 64) - 512),
    "crypt method": (32, ">I", 9),
    "L1 size too small": (36, ">I", 0),
    "L1 size too large": (36, ">I", 0x7FFFFFFF),
    "L1 offset unaligned": (40, ">Q", 12345),
    "L1 offset outside the file": (40, ">Q", 1 << 50),
    "refcount table offset unaligned": (48, ">Q", 7),
    "refcount table offset outside the file": (48, ">Q", 1 << 50),
    "refcount table clusters": (56, ">I", 0x7FFFFFFF),
    "snapshots": (60, ">I", 0x7FFFFFFF),
    "incompatible features": (72, ">Q", 1 << 40),
    "refcount order": (96, ">I", 12),
    "header length": (100, ">I", 1 << 30),
}


# The root has no backing file, so nobody looks at how long its name would be.
_CASES = [
    (which, field)
    for which in ("top", "base", "root")
    for field in FIELDS
    if (which, field) != ("root", "backing name length")
]


@pytest.mark.parametrize(("which", "field"), _CASES)
def test_header_fields_out_of_range(victim: Victim, which: str, field: str) -> None:
    offset, code, value = FIELDS[field]
    _patch(getattr(victim, which), offset, struct.pack(code, value))
    assert_refuses(victim.directory, victim.top, "")


@pytest.mark.parametrize("which", ["top", "base", "root"])
@pytest.mark.parametrize("length", [0, 3, 50, 104, 4096, 5000, 12288, 40000])
def test_truncated_files(victim: Victim, which: str, length: int) -> None:
    image: Path = getattr(victim, which)
    assert length < image.stat().st_size
    os.truncate(image, length)
    assert_refuses(victim.directory, victim.top, "")


@pytest.mark.parametrize("which", ["top", "base", "root"])
def test_garbage_files(victim: Victim, which: str) -> None:
    getattr(victim, which).write_bytes(bytes(range(256)) * 512)
    assert_refuses(victim.directory, victim.top, "wrong-format", "image-format-unknown")


def _l1(image: Path) -> int:
    return _number(image, 40)


def _l2(image: Path) -> int:
    return _number(image, _l1(image)) & 0x00FFFFFFFFFFFE00


def _refcount_table(image: Path) -> int:
    return _number(image, 48)


TABLES = {
    "L1 entry": _l1,
    "L2 entry": _l2,
    "refcount table entry": _refcount_table,
}
BAD_OFFSETS = {
    "outside the file": (1 << 63) | (1 << 45),
    "unaligned": (1 << 63) | 0x12200,
    "reserved bits": (1 << 63) | (0x3F << 56) | 0x10000,
}


@pytest.mark.parametrize("bad", BAD_OFFSETS)
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("which", ["top", "base"])
def test_offsets_in_tables(victim: Victim, which: str, table: str, bad: str) -> None:
    image: Path = getattr(victim, which)
    value = BAD_OFFSETS[bad]
    if table == "refcount table entry":
        value &= ~(1 << 63)
    _patch(image, TABLES[table](image), struct.pack(">Q", value))
    if which == "top" and table == "refcount table entry":
        # Nothing is written to top, so its refcounts do not matter.
        for command in commands(victim.top):
            assert_civil(chainmerge(*command))
        return
    assert_refuses(victim.directory, victim.top, "")


def test_tables_that_overlap(victim: Victim) -> None:
    """Base's first L2 entry leads to the L1 table itself."""
    _patch(victim.base, _l2(victim.base), struct.pack(">Q", (1 << 63) | _l1(victim.base)))
    assert_refuses(victim.directory, victim.top, "image-damaged")


def _bitmaps_extension(image: Path) -> int:
    content = image.read_bytes()
    return content.index(struct.pack(">II", 0x23852875, 24))


@pytest.mark.parametrize("which", ["top", "base", "root"])
@pytest.mark.parametrize(
    ("field", "code", "value"),
    [
        (8, ">I", 0xFFFFFF),  # number of bitmaps
        (16, ">Q", 1 << 60),  # directory size
        (24, ">Q", 1 << 50),  # directory offset outside the file
        (24, ">Q", 777),  # directory offset unaligned
    ],
)
def test_bitmap_directory(victim: Victim, which: str, field: int, code: str, value: int) -> None:
    image: Path = getattr(victim, which)
    _patch(image, _bitmaps_extension(image) + field, struct.pack(code, value))
    assert_refuses(victim.directory, victim.top, "")


@pytest.mark.parametrize("value", [1 << 50, 0x1200, 0xFF << 56])
def test_bitmap_tables_of_top(victim: Victim, value: int) -> None:
    directory = _number(victim.top, _bitmaps_extension(victim.top) + 24)
    _patch(victim.top, directory, struct.pack(">Q", value))
    assert_refuses(victim.directory, victim.top, "")


def test_backing_cycle(victim: Victim) -> None:
    qemu_img("rebase", "-u", "-F", "qcow2", "-b", "top.qcow2", victim.root)
    assert_refuses(victim.directory, victim.top, "backing-cycle")


def test_missing_backing_file(victim: Victim) -> None:
    victim.base.unlink()
    assert_refuses(victim.directory, victim.top, "backing-file-missing")


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ('json:{"driver":"qcow2","file":{"driver":"file","filename":"/etc/passwd"}}', "json"),
        ("nbd:localhost:10809", "remote"),
        ("ssh://host/image", "remote"),
        ("/etc/passwd", "outside"),
    ],
)
def test_backing_names_that_are_not_followed(victim: Victim, name: str, code: str) -> None:
    qemu_img("rebase", "-u", "-F", "qcow2", "-b", name, victim.base)
    assert_refuses(victim.directory, victim.top, f"backing-name-{code}", f"backing-file-{code}")


def test_base_with_another_child(victim: Victim) -> None:
    create(victim.directory / "other.qcow2", backing="base.qcow2")
    assert_refuses(victim.directory, victim.top, "base-has-other-children")


@pytest.mark.parametrize("which", ["top", "base", "root"])
def test_locked_images(victim: Victim, which: str) -> None:
    with lock_image(getattr(victim, which), LockMode.WRITER, 0):
        ran = chainmerge("merge", "--lock-wait", "0", victim.top)
    assert ran.status == ExitCode.REFUSED
    assert f"(pid {os.getpid()})" in ran.err
    assert_civil(ran)


def test_corrupt_and_dirty_marks(victim: Victim) -> None:
    for bits, code in ((1, "image-dirty"), (2, "image-corrupt")):
        _patch(victim.base, 72, struct.pack(">Q", bits))
        assert_refuses(victim.directory, victim.top, code)


def test_read_only_base(tmp_path: Path) -> None:
    template = create(tmp_path / "template", 8 * MIB)
    backing = tmp_path / "volume"
    with loop_device(backing, 16 * MIB) as device:
        device.write_bytes(template.read_bytes())
    with loop_device(backing, 16 * MIB, "--read-only") as device:
        top = create(tmp_path / "top.qcow2", backing=device)
        qemu_io(top, "write -P 1 0 1M")
        with unchanged(tmp_path):
            ran = chainmerge("merge", "--allow-backing", "/dev", top)
        assert ran.status == ExitCode.REFUSED
        assert_civil(ran)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_full_file_system(tmp_path: Path, kind: str) -> None:
    size = 32 * MIB if kind == "ext4" else 320 * MIB
    with mounted_file_system(tmp_path, kind, size) as mounted:
        base = create(mounted / "base.qcow2", 1 << 30)
        qemu_img("bitmap", "--add", base, "stale")
        top = create(tmp_path / "top.qcow2", backing=base)
        qemu_io(top, f"write -P 1 0 {size}")
        before = base.read_bytes(), top.read_bytes()
        ran = chainmerge("merge", "--allow-backing", mounted, top)
        assert ran.status == ExitCode.REFUSED
        assert "bytes are missing" in ran.err
        assert (base.read_bytes(), top.read_bytes()) == before
        assert_civil(ran)


@pytest.mark.parametrize("kind", ["raw", "v2"])
def test_bitmaps_that_base_cannot_hold(tmp_path: Path, kind: str) -> None:
    directory = tmp_path / "chain"
    directory.mkdir()
    if kind == "raw":
        create(directory / "base", 8 * MIB, fmt="raw")
    else:
        create(directory / "base", 8 * MIB, compat="0.10")
    top = create(
        directory / "top", backing="base", backing_format="raw" if kind == "raw" else "qcow2"
    )
    qemu_img("bitmap", "--add", top, "cp")
    assert_refuses(directory, top, "base-cannot-hold-bitmaps")


def test_names_meant_for_the_terminal(tmp_path: Path) -> None:
    evil = "\x1b[31mred\x1b[0m\r\n[bold]markup[/bold]\x07"
    base = create(tmp_path / "base.qcow2", 8 * MIB)
    top = create(tmp_path / "top.qcow2", backing=base.name)
    added = chainmerge("bitmaps", "add", base, "--", evil)
    assert_civil(added)
    assert added.status == ExitCode.DONE
    assert evil in [bitmap["name"] for bitmap in _bitmaps(base)]
    for command in commands(top):
        assert_civil(chainmerge(*command))


def _bitmaps(image: Path) -> Iterator[dict[str, str]]:
    yield from info(image)["format-specific"]["data"].get("bitmaps", [])


def test_things_that_are_no_images(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    for name in ("pipe", "directory", "nothing"):
        for command in commands(tmp_path / name):
            ran = chainmerge(*command)
            assert ran.status == ExitCode.REFUSED, command
            assert_civil(ran)
