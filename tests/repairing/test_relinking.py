# SPDX-License-Identifier: Apache-2.0
"""Another backing file for an image: only where everything stays what it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import chainmerge
from chainmerge.chain.errors import (
    BackingCycle,
    BackingFileMissing,
    BackingFileOutside,
    FormatMissing,
    WrongFormat,
)
from chainmerge.options import Access
from chainmerge.records.saved_bitmaps import saved_bitmaps_file
from chainmerge.repairing.errors import (
    RelinkChangesCheckpoints,
    RelinkChangesContent,
    RelinkUncheckable,
    RelinkUnfinished,
)
from chainmerge.storage.errors import ImageLocked
from chainmerge.storage.locks import LockMode, lock_image
from tests.support.cli import chainmerge as run
from tests.support.foreign import Kind, foreign_image
from tests.support.qemu import assert_clean, content, create, info, qemu_img, qemu_io

MIB = 1 << 20


@pytest.fixture
def chain(tmp_path: Path) -> tuple[Path, Path]:
    base = create(tmp_path / "base.qcow2", 16 * MIB)
    qemu_io(base, "write -P 1 0 2M")
    top = create(tmp_path / "top.qcow2", backing="base.qcow2")
    qemu_io(top, "write -P 2 1M 64k")
    return base, top


def backing_of(image: Path) -> str | None:
    name: str | None = info(image).get("backing-filename")
    return name


def moved(base: Path, *below: str) -> Path:
    """Base under another name, as it is left by somebody who tidies up."""
    elsewhere = base.parent.joinpath(*below, "renamed.qcow2")
    elsewhere.parent.mkdir(exist_ok=True)
    return base.rename(elsewhere)


def test_a_copy_takes_the_place_of_the_original(chain: tuple[Path, Path]) -> None:
    base, top = chain
    before = content(top)
    copy = base.with_name("copy.qcow2")
    shutil.copy(base, copy)
    report = chainmerge.relink(top, copy)
    assert (report.old_backing, report.backing, report.backing_format) == (
        "base.qcow2",
        "copy.qcow2",
        "qcow2",
    )
    assert len(report.verified) == 2
    base.unlink()
    assert content(top) == before
    assert_clean(top)
    again = chainmerge.relink(top, copy)
    assert again.backing == "copy.qcow2"


def test_a_conversion_of_the_backing_file_to_raw(chain: tuple[Path, Path]) -> None:
    base, top = chain
    before = content(top)
    raw = base.with_name("base.raw")
    qemu_img("convert", "-O", "raw", base, raw)
    with pytest.raises(WrongFormat):
        chainmerge.relink(top, raw)
    report = chainmerge.relink(top, raw, Access(formats={str(raw): "raw"}))
    assert (report.backing, report.backing_format) == ("base.raw", "raw")
    assert content(top) == before


def test_no_backing_file_where_none_is_needed(tmp_path: Path) -> None:
    create(tmp_path / "base.qcow2", MIB)
    top = create(tmp_path / "top.qcow2", backing="base.qcow2")
    qemu_io(top, "write -P 2 0 64k")
    before = content(top)
    assert chainmerge.relink(top, None).backing is None
    assert backing_of(top) is None
    assert content(top) == before


@pytest.mark.parametrize("where", ["in the image", "behind the end of the new one"])
def test_other_content_is_refused(chain: tuple[Path, Path], where: str) -> None:
    base, top = chain
    other = base.with_name("other.qcow2")
    shutil.copy(base, other)
    if where == "in the image":
        qemu_io(other, "write -P 9 5M 512")
    else:
        qemu_io(base, "write -P 9 15M 512")
        qemu_img("resize", "--shrink", other, "8M")
    before = top.read_bytes()
    with pytest.raises(RelinkChangesContent) as caught:
        chainmerge.relink(top, other)
    assert caught.value.offset == (5 if where == "in the image" else 15) * MIB
    assert top.read_bytes() == before


def test_what_the_image_hides_does_not_count_but_for_its_snapshots(
    chain: tuple[Path, Path],
) -> None:
    base, top = chain
    other = base.with_name("other.qcow2")
    shutil.copy(base, other)
    qemu_io(other, "write -P 9 1M 64k")
    plain = base.with_name("plain.qcow2")
    shutil.copy(top, plain)
    assert chainmerge.relink(plain, other).verified
    # The snapshot is older than what the image has there.
    with_snapshot = create(base.with_name("snapshot.qcow2"), backing="base.qcow2")
    qemu_img("snapshot", "-c", "keep", with_snapshot)
    qemu_io(with_snapshot, "write -P 2 1M 64k")
    with pytest.raises(RelinkChangesContent) as caught:
        chainmerge.relink(with_snapshot, other)
    assert "internal snapshot" in caught.value.sentence


def test_a_copy_of_an_image_of_another_format(tmp_path: Path) -> None:
    old = foreign_image(tmp_path, Kind("vdi"))
    leaf = create(tmp_path / "leaf.qcow2", backing=old, backing_format="vdi")
    before = content(leaf)
    copy = tmp_path / "copy.qcow2"
    qemu_img("convert", "-f", "vdi", "-O", "qcow2", old, copy)
    other = tmp_path / "other.qcow2"
    shutil.copy(copy, other)
    qemu_io(other, "write -q -P 9 7M 512")
    access = Access(formats={str(copy): "qcow2", str(other): "qcow2", str(old): "vdi"})
    with pytest.raises(RelinkChangesContent):
        chainmerge.relink(leaf, other, access)
    assert chainmerge.relink(leaf, copy, access).verified
    assert info(leaf)["backing-filename-format"] == "qcow2"
    assert content(leaf) == before
    assert chainmerge.relink(leaf, old, access).verified
    assert info(leaf)["backing-filename-format"] == "vdi"
    with old.open("r+b") as file:
        file.seek(0x40)
        file.write(b"nope")
    with pytest.raises(RelinkUncheckable, match="the vdi image"):
        chainmerge.relink(leaf, copy, access)


def test_a_lost_backing_file_is_found_and_linked(chain: tuple[Path, Path]) -> None:
    base, top = chain
    before = content(top)
    qemu_img("bitmap", "--add", top, "day")
    elsewhere = moved(base)
    found = chainmerge.find_backing(top)
    assert found.backing == "base.qcow2"
    assert found.problem is not None
    assert found.candidates[0].path == str(elsewhere)
    with pytest.raises(RelinkUncheckable):
        chainmerge.relink(top, elsewhere)
    report = chainmerge.relink(top, elsewhere, unchecked=True)
    assert report.verified == ()
    assert "'day'" in report.warnings[1]
    assert content(top) == before
    assert chainmerge.find_backing(top).problem is None


def test_the_same_name_elsewhere_is_the_likeliest(chain: tuple[Path, Path]) -> None:
    base, top = chain
    directory = base.parent / "archive"
    directory.mkdir()
    for name in ("a.qcow2", "z.qcow2"):
        create(base.with_name(name), 16 * MIB)
    base.rename(directory / base.name)
    found = chainmerge.find_backing(top, Access(search=(str(directory),)))
    assert found.candidates[0].path == str(directory / base.name)
    # What stands on the image is not below it.
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "top.qcow2", "-F", "qcow2",
             top.with_name("child.qcow2"), "16M")  # fmt: skip
    near = [Path(one.path) for one in chainmerge.find_backing(top).candidates]
    assert {path.name for path in near if path.parent == top.parent} == {"a.qcow2", "z.qcow2"}


def test_another_directory_is_warned_of(chain: tuple[Path, Path]) -> None:
    base, top = chain
    before = content(top)
    directory = base.parent / "archive"
    directory.mkdir()
    copy = Path(shutil.copy(base, directory))
    report = chainmerge.relink(top, copy)
    assert f"--allow-backing {directory}" in report.warnings[0]
    base.unlink()
    assert content(top) == before


def test_what_may_not_be_read_is_asked_for(chain: tuple[Path, Path], tmp_path: Path) -> None:
    base, top = chain
    outside = tmp_path / "outside"
    outside.mkdir()
    base.rename(outside / base.name)
    qemu_img("rebase", "-u", "-F", "qcow2", "-b", outside / base.name, top)
    copy = Path(shutil.copy(outside / base.name, tmp_path / "copy.qcow2"))
    with pytest.raises(BackingFileOutside):
        chainmerge.relink(top, copy)
    chainmerge.relink(top, copy, Access(allow_backing=(str(outside),)))
    assert backing_of(top) == str(copy)


def test_a_cycle_is_refused(chain: tuple[Path, Path]) -> None:
    base, top = chain
    child = create(base.with_name("child.qcow2"), backing="top.qcow2")
    for unchecked in (False, True):
        with pytest.raises(BackingCycle):
            chainmerge.relink(top, child, unchecked=unchecked)
        with pytest.raises(BackingCycle):
            chainmerge.relink(top, top, unchecked=unchecked)


def test_a_format_is_never_guessed(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(MIB))
    top = create(tmp_path / "top.qcow2", MIB)
    with pytest.raises((FormatMissing, WrongFormat, chainmerge.ChainmergeError)) as caught:
        chainmerge.relink(top, raw)
    assert caught.value.exit_code == 3
    assert chainmerge.relink(top, raw, Access(formats={str(raw): "raw"})).backing == "disk.raw"


def test_an_image_in_use_is_refused(chain: tuple[Path, Path]) -> None:
    base, top = chain
    copy = Path(shutil.copy(base, base.with_name("copy.qcow2")))
    child = create(base.with_name("child.qcow2"), backing="top.qcow2")
    with lock_image(top, LockMode.READER, 0), pytest.raises(ImageLocked):
        chainmerge.relink(top, copy, Access(lock_wait=0))
    assert content(child) == content(top)


def test_a_missing_new_file_is_named(chain: tuple[Path, Path]) -> None:
    _, top = chain
    with pytest.raises(chainmerge.ChainmergeError) as caught:
        chainmerge.relink(top, top.with_name("nothing.qcow2"), unchecked=True)
    assert caught.value.exit_code == 3
    assert "nothing.qcow2" in caught.value.sentence


BITMAPS = st.lists(st.sampled_from(("absent", "valid", "disabled")), min_size=2, max_size=2)


@settings(max_examples=12, deadline=None)
@given(before=BITMAPS, after=BITMAPS, wide=st.booleans())
def test_checkpoints_are_worth_the_same(
    tmp_path_factory: pytest.TempPathFactory, before: list[str], after: list[str], wide: bool
) -> None:
    """Against the rule by which a backup reads a checkpoint, told once more in a few lines."""
    directory = tmp_path_factory.mktemp("chain")
    root, copy, top = (directory / name for name in ("root.qcow2", "copy.qcow2", "top.qcow2"))
    create(root, 4 * MIB)
    create(copy, 4 * MIB)
    in_top, in_root = before
    in_copy = after[1]
    for image, state in ((root, in_root), (copy, in_copy)):
        if state != "absent":
            flag = "--enable" if state == "valid" else "--disable"
            qemu_img("bitmap", "--add", flag, image, "day")
        is_wider = wide and image == root
        qemu_io(image, "write -P 3 0 64k", *(("write -P 0 1M 64k",) if is_wider else ()))
    create(top, backing="root.qcow2")
    if in_top != "absent":
        flag = "--enable" if in_top == "valid" else "--disable"
        qemu_img("bitmap", "--add", flag, top, "day")
    bits = {"root": {0, 16} if wide else {0}, "copy": {0}}

    def worth(below: str, which: str) -> object:
        if in_top == "absent":
            return below != "absent"
        if in_top == "disabled" or below == "disabled":
            return "broken"
        return bits[which] if below == "valid" else set()

    old, new = worth(in_root, "root"), worth(in_copy, "copy")
    fits = old == new or (isinstance(old, set) and isinstance(new, set) and old <= new)
    if fits:
        chainmerge.relink(top, copy)
    else:
        with pytest.raises(RelinkChangesCheckpoints):
            chainmerge.relink(top, copy)
        assert backing_of(top) == "root.qcow2"


def test_an_unfinished_merge_comes_first(chain: tuple[Path, Path]) -> None:
    base, top = chain
    copy = Path(shutil.copy(base, base.with_name("copy.qcow2")))
    saved_bitmaps_file(base).write_bytes(b"what a merge saved before it was killed")
    with pytest.raises(RelinkUnfinished):
        chainmerge.relink(top, copy)


def test_the_command_line(chain: tuple[Path, Path]) -> None:
    base, top = chain
    elsewhere = moved(base)
    listing = run("relink", top)
    assert listing.status == 0
    assert "renamed.qcow2" in listing.out
    assert run("relink", top, "--backing", elsewhere).status == 3
    assert run("relink", top, "--unchecked").status == 2
    assert run("relink", top, "--backing", elsewhere, "--no-backing").status == 2
    assert run("relink", top, "--backing", elsewhere, "--unchecked").status == 0
    assert backing_of(top) == "renamed.qcow2"


def test_a_merge_names_the_file_that_was_moved(chain: tuple[Path, Path]) -> None:
    base, top = chain
    elsewhere = moved(base)
    with pytest.raises(BackingFileMissing) as caught:
        chainmerge.plan(top)
    assert str(elsewhere) in caught.value.advice
    assert f"chainmerge relink {top} --backing NEW" in caught.value.advice
