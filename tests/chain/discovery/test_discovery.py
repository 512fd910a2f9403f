# SPDX-License-Identifier: Apache-2.0
"""What a chain is found to be, from any of its names."""

import os
import shutil
from functools import partial
from pathlib import Path

import pytest

from chainmerge.chain.discovery import discover
from chainmerge.chain.errors import (
    BackingCycle,
    BackingFileMissing,
    BackingFileOutside,
    BackingNameUnusable,
    ChainTooLong,
    ImageReplaced,
    JsonBackingName,
    NoBackingFile,
    NotInChain,
    RemoteBackingName,
)
from chainmerge.chain.model import ChainPolicy, ImageFormat
from chainmerge.chain.reading import open_image
from chainmerge.qcow2.table_errors import BadBitmapDirectory
from chainmerge.storage.errors import ImageMissing, WrongFileType
from tests.chain.discovery.small_chain import PLAIN, names
from tests.chain.overlays import SIZE, overlay
from tests.chain.unchanged import refusal, unchanged
from tests.support import qemu

# What is found


def test_from_the_root_to_the_image_asked_for(images: Path) -> None:
    with unchanged(images):
        chain = discover(images / "top", PLAIN)
    assert [image.path for image in chain.images] == [
        images / "base",
        images / "middle",
        images / "top",
    ]
    assert chain.root == chain.images[0]
    assert chain.base == chain.images[1]
    assert chain.top == chain.images[2]
    assert chain.middle(0) == chain.images[1:2]
    assert chain.top.backing == images / "middle"
    assert chain.top.backing_name == "middle"
    assert chain.root.backing is None
    assert all(image.format is ImageFormat.QCOW2 for image in chain.images)
    assert [image.format_declared for image in chain.images] == [True, True, False]
    assert all(image.notes == () for image in chain.images)


def test_a_root_alone(images: Path) -> None:
    chain = discover(images / "base", PLAIN)
    assert chain.top == chain.root
    error = refusal(NoBackingFile, images, lambda: chain.base_index)
    assert error.image == str(images / "base")


def test_a_relative_path_counts_from_the_current_directory(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images)
    chain = discover(Path("top"), PLAIN)
    assert [image.path for image in chain.images] == [
        images / name for name in ("base", "middle", "top")
    ]


def test_a_raw_root(images: Path) -> None:
    (images / "odd").write_bytes(b"x" * 1000)
    overlay(images / "on-raw", "odd", "raw")
    root = discover(images / "on-raw", PLAIN).root
    assert (root.format, root.header, root.file_size) == (ImageFormat.RAW, None, 1000)
    assert root.virtual_size == 1024 == qemu.info(images / "odd")["virtual-size"]
    assert not root.supports_bitmaps


def test_bitmaps_are_listed(images: Path) -> None:
    qemu.qemu_img("bitmap", "--add", images / "middle", "monday")
    chain = discover(images / "top", PLAIN)
    assert [[entry.name for entry in image.bitmaps] for image in chain.images] == [
        [],
        ["monday"],
        [],
    ]
    assert chain.base.bitmaps_trusted
    assert not chain.top.bitmaps_trusted


def test_version_2_cannot_hold_bitmaps(images: Path) -> None:
    qemu.create(images / "old", SIZE, compat="0.10")
    assert not discover(images / "old", PLAIN).top.supports_bitmaps
    assert discover(images / "top", PLAIN).top.supports_bitmaps


@pytest.mark.parametrize(
    ("size", "note"),
    [
        (2 * SIZE, f"its disk is {SIZE} bytes larger than that of its backing file"),
        (SIZE // 2, f"its disk is {SIZE // 2} bytes smaller than that of its backing file"),
    ],
)
def test_sizes_that_change_along_the_chain(images: Path, size: int, note: str) -> None:
    qemu.create(images / "resized", size, backing=images / "top")
    chain = discover(images / "resized", PLAIN)
    assert chain.top.notes == (note,)
    assert chain.base.notes == ()


def test_encryption_is_seen(images: Path) -> None:
    # The old scheme: making up a LUKS key takes seconds.
    qemu.qemu_img(
        "create", "-q", "--object", "secret,id=key,data=12345678", "-f", "qcow2",
        "-o", "encrypt.format=aes,encrypt.key-secret=key", images / "locked", "1M",
    )  # fmt: skip
    locked = discover(images / "locked", PLAIN).top
    assert locked.encrypted
    assert locked.notes == ("its guest data is encrypted (AES)",)
    assert not discover(images / "top", PLAIN).top.encrypted


@pytest.mark.parametrize(
    ("bit", "note"),
    [(1, "it was not closed properly (dirty bit)"), (2, "QEMU has marked it corrupt")],
)
def test_what_a_header_confesses(images: Path, bit: int, note: str) -> None:
    with (images / "base").open("r+b") as file:
        file.seek(79)
        file.write(bytes([bit]))
    assert discover(images / "top", PLAIN).root.notes == (note,)


# Names


def test_a_relative_name_counts_from_the_path_given_not_from_the_link_resolved(
    images: Path, tmp_path: Path
) -> None:
    links = tmp_path / "links"
    links.mkdir()
    (links / "top").symlink_to("../images/top")
    error = refusal(BackingFileMissing, tmp_path, lambda: discover(links / "top", PLAIN))
    assert (error.image, error.name) == (str(links / "top"), "middle")
    with pytest.raises(qemu.ToolFailed, match=r"links/middle.*No such file"):
        qemu.qemu_img("info", "--backing-chain", links / "top")

    (links / "middle").symlink_to("../images/middle")
    (links / "base").symlink_to("../images/base")
    chain = discover(links / "top", PLAIN)
    assert [image.path for image in chain.images] == [
        links / name for name in ("base", "middle", "top")
    ]
    assert [image.real_path for image in chain.images] == [
        images / name for name in ("base", "middle", "top")
    ]


def test_names_that_lead_to_the_same_place(images: Path) -> None:
    (images / "link").symlink_to("base")
    for name in ("./base", images / "base", f"file:{images}/base", "../images/base", "link"):
        overlay(images / "another", name)
        root = discover(images / "another", PLAIN).root
        assert root.real_path == images / "base", name


def test_a_name_with_a_colon_behind_a_slash(images: Path) -> None:
    shutil.copy(images / "base", images / "nbd:1")
    overlay(images / "colon", "./nbd:1")
    assert names(images / "colon") == ["nbd:1", "colon"]


@pytest.mark.parametrize(
    ("name", "protocol"),
    [
        ("nbd:localhost:10809", "nbd"),
        ("nbd+unix:///disk?socket=/run/s", "nbd+unix"),
        ("http://127.0.0.1/disk", "http"),
        ("ssh://root@127.0.0.1/disk", "ssh"),
        ("rbd:pool/disk", "rbd"),
        ("fat:/etc", "fat"),
        ("host_device:/dev/vda", "host_device"),
        ("base:1", "base"),
    ],
)
def test_remote_names_are_refused(images: Path, name: str, protocol: str) -> None:
    overlay(images / "remote", name)
    error = refusal(RemoteBackingName, images, lambda: discover(images / "remote", PLAIN))
    assert (error.image, error.name, error.protocol) == (str(images / "remote"), name, protocol)


def test_json_names_are_refused(images: Path) -> None:
    name = 'json:{"driver":"qcow2","file":{"driver":"file","filename":"base"}}'
    overlay(images / "json", "-" * len(name))
    patch(images / "json", b"-" * len(name), name.encode())
    error = refusal(JsonBackingName, images, lambda: discover(images / "json", PLAIN))
    assert error.name == name


def test_a_relative_name_behind_file_is_refused(images: Path) -> None:
    overlay(images / "where", "file:base")
    error = refusal(BackingNameUnusable, images, lambda: discover(images / "where", PLAIN))
    assert error.name == "file:base"


def test_control_characters_of_a_name_do_not_reach_the_terminal(images: Path) -> None:
    overlay(images / "evil", "bas\x1b[2J")
    error = refusal(BackingFileMissing, images, lambda: discover(images / "evil", PLAIN))
    assert "\\x1b[2J" in error.sentence


def test_a_missing_backing_file(images: Path) -> None:
    (images / "base").unlink()
    error = refusal(BackingFileMissing, images, lambda: discover(images / "top", PLAIN))
    assert (error.image, error.name) == (str(images / "middle"), "base")
    assert str(images / "base") in error.sentence
    assert "chainmerge relink" in error.advice


@pytest.mark.parametrize("name", ["pipe", "directory", "loop"])
def test_backing_files_that_are_no_files(images: Path, name: str) -> None:
    os.mkfifo(images / "pipe")
    (images / "directory").mkdir()
    (images / "loop").symlink_to("loop")
    overlay(images / "strange", name)
    error = refusal(BackingFileMissing, images, lambda: discover(images / "strange", PLAIN))
    assert error.name == name


@pytest.mark.parametrize("name", ["/dev/null", "../outside", "link"])
def test_what_may_not_be_used_is_not_even_opened(
    images: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Tapes rewind, and automounts mount, when they are opened."""
    (images.parent / "outside").write_bytes(b"secret")
    (images / "link").symlink_to("../outside")
    overlay(images / "strange", name)
    opened: list[str] = []

    def watched(path: str, *arguments: int, **more: int) -> int:
        opened.append(os.fspath(path))
        return os_open(path, *arguments, **more)

    os_open = os.open
    monkeypatch.setattr(os, "open", watched)
    refusal(BackingFileOutside, images, lambda: discover(images / "strange", PLAIN))
    assert {Path(path) for path in opened} == {images / "strange"}


def test_the_image_asked_for_must_be_a_file(images: Path) -> None:
    refusal(ImageMissing, images, lambda: discover(images / "nothing", PLAIN))
    refusal(WrongFileType, images, lambda: discover(images, PLAIN))


# Shapes that are no chains


def test_an_image_that_is_its_own_backing_file(images: Path) -> None:
    overlay(images / "snake", "snake")
    error = refusal(BackingCycle, images, lambda: discover(images / "snake", PLAIN))
    assert error.image == error.seen == str(images / "snake")


@pytest.mark.parametrize("disguise", ["none", "hard link", "symbolic link"])
def test_a_cycle(images: Path, disguise: str) -> None:
    name = "top" if disguise == "none" else "tail"
    overlay(images / "base", name)
    if disguise == "hard link":
        (images / "tail").hardlink_to(images / "top")
    if disguise == "symbolic link":
        (images / "tail").symlink_to("top")
    error = refusal(BackingCycle, images, lambda: discover(images / "top", PLAIN))
    assert (error.image, error.name) == (str(images / "base"), name)
    assert error.seen == str(images / "top")


def test_the_length_of_a_chain_is_limited(images: Path) -> None:
    assert len(discover(images / "top", ChainPolicy(max_images=3)).images) == 3
    error = refusal(
        ChainTooLong, images, lambda: discover(images / "top", ChainPolicy(max_images=2))
    )
    assert (error.top, error.limit) == (str(images / "top"), 2)


def test_a_chain_far_longer_than_any_stack(images: Path) -> None:
    options = "cluster_size=512,backing_file=------,backing_fmt=qcow2"
    first = images / "000000"
    qemu.qemu_img("create", "-q", "-u", "-f", "qcow2", "-o", options, first, "512")
    template = first.read_bytes()
    for level in range(1, 3000):
        content = template.replace(b"------", b"%06d" % (level - 1), 1)
        (images / f"{level:06}").write_bytes(content)
    (images / "base").rename(images / "------")
    assert len(discover(images / "002999", PLAIN).images) == 3001


# Looking an image up, and opening it again


def test_images_are_found_by_any_of_their_names(images: Path) -> None:
    (images / "soft").symlink_to("base")
    (images / "hard").hardlink_to(images / "middle")
    chain = discover(images / "top", PLAIN)
    assert [chain.index_of(images / name) for name in ("soft", "hard", "top", "base")] == [
        0, 1, 2, 0,
    ]  # fmt: skip
    qemu.create(images / "stranger", SIZE)
    for name in ("stranger", "nothing"):
        error = refusal(NotInChain, images, partial(chain.index_of, images / name))
        assert error.image == str(images / name)


def test_an_image_is_opened_again_only_if_it_is_still_the_same(images: Path) -> None:
    top = discover(images / "top", PLAIN).top
    with open_image(top) as readable:
        assert readable.read(0, 4) == b"QFI\xfb"
    shutil.copy(images / "top", images / "copy")
    (images / "copy").replace(images / "top")
    refusal(ImageReplaced, images, lambda: open_image(top))


# Bitmaps that cannot be trusted


def patch(image: Path, old: bytes, new: bytes) -> None:
    """Replace one occurrence of some bytes by as many others."""
    assert len(old) == len(new)
    content = image.read_bytes()
    assert content.count(old) == 1
    image.write_bytes(content.replace(old, new))


def clear_autoclear(image: Path) -> None:
    with image.open("r+b") as file:
        file.seek(88)
        file.write(bytes(8))


def break_directory(image: Path) -> None:
    """Make the name of the bitmap ``monday`` longer than the directory."""
    content = bytearray(image.read_bytes())
    name = content.index(b"monday")
    content[name - 6 : name - 4] = b"\xff\xff"
    image.write_bytes(content)


def test_bitmaps_of_a_writer_that_did_not_know_them(images: Path) -> None:
    qemu.qemu_img("bitmap", "--add", images / "middle", "monday")
    clear_autoclear(images / "middle")
    base = discover(images / "top", PLAIN).base
    assert not base.bitmaps_trusted
    assert [entry.name for entry in base.bitmaps] == ["monday"]
    assert len(base.notes) == 1

    break_directory(images / "middle")
    base = discover(images / "top", PLAIN).base
    assert base.bitmaps == ()
    assert base.bitmaps_problem is not None


def test_a_broken_bitmap_directory_is_refused_as_qemu_does(images: Path) -> None:
    qemu.qemu_img("bitmap", "--add", images / "middle", "monday")
    break_directory(images / "middle")
    with pytest.raises(qemu.ToolFailed):
        qemu.qemu_img("info", images / "middle")
    error = refusal(BadBitmapDirectory, images, lambda: discover(images / "top", PLAIN))
    assert error.image == str(images / "middle")


def test_detours_in_stored_names_are_not_shown(images: Path) -> None:
    golden, vm = images / "golden", images / "vm"
    golden.mkdir()
    vm.mkdir()
    qemu.create(golden / "root", SIZE)
    qemu.create(vm / "leaf", backing="../golden/root")
    policy = ChainPolicy(allow_backing=(golden,))
    found = discover(vm / ".." / "vm" / "leaf", policy)
    assert [image.path for image in found.images] == [golden / "root", vm / "leaf"]
    # Elsewhere than the name alone says.
    (images / "elsewhere").mkdir()
    (images / "elsewhere" / "vm").mkdir()
    (images / "link").symlink_to(images / "elsewhere" / "vm")
    (images / "elsewhere" / "golden").symlink_to(golden)
    qemu.create(images / "elsewhere" / "vm" / "leaf", backing="../golden/root")
    found = discover(images / "link" / "leaf", policy)
    assert found.root.path == images / "link" / ".." / "golden" / "root"
    assert found.root.real_path == golden / "root"
