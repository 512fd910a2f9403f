# SPDX-License-Identifier: Apache-2.0
"""Broken images and hostile ones: every command says what is wrong, and nothing is changed."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path
from typing import Final

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from chainmerge.errors import ExitCode
from tests.chain.overlays import overlay
from tests.chain.unchanged import unchanged
from tests.merging.hostile.spoiling import GARBAGE, ROLES
from tests.support import qemu
from tests.support.hostile import (
    CLUSTER,
    DISK,
    Victim,
    assert_civil,
    assert_refuses,
    chainmerge,
    commands,
)
from tests.support.qemu import assert_clean, content, create, qemu_img
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
    put_bytes,
)
from tests.support.wounds import OVERLAPS, WOUNDS, Anatomy, inflict

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


def test_the_victim_merges_when_nothing_is_wrong(victim: Victim) -> None:
    expected = content(victim.top)
    ran = chainmerge("merge", victim.top)
    assert ran.status == ExitCode.DONE, ran
    assert content(victim.base) == expected


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
    code = "foreign-format" if fmt == "qcow" else "base-foreign"
    assert fmt in assert_refuses(victim.directory, victim.top, code)


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
        leaks = _leaks_if_any(victim.base)
        ran = chainmerge("merge", victim.top)
        assert_civil(ran)
        event(f"status {ran.status}")
        if ran.status == ExitCode.DONE:
            # What a lost extension of the header named is leaked before and after.
            checked = qemu.check(victim.base)
            assert checked["corruptions"] == 0, checked
            assert checked["leaks"] <= leaks, checked
            assert expected is None or content(victim.base).startswith(expected)
        elif ran.status == ExitCode.REFUSED:
            assert {each: victim.image(each).read_bytes() for each in ROLES} == before
        else:
            # Compressed data is looked at when it is copied.
            assert "compressed cluster at offset" in ran.err or "leak" in ran.err, ran
            assert victim.top.read_bytes() == before["top"]


def _leaks_if_any(image: Path) -> int:
    try:
        return int(qemu.check(image)["leaks"])
    except qemu.ToolFailed:
        return 0


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
    assert "`chainmerge repair` shows" in ran.out
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
