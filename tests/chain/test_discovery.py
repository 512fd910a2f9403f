# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

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
    DataFileRefused,
    ForeignFormat,
    FormatContradiction,
    FormatMissing,
    ImageReplaced,
    JsonBackingName,
    NoBackingFile,
    NotInChain,
    RemoteBackingName,
    TopFormatUnknown,
    WrongFormat,
)
from chainmerge.chain.model import ChainPolicy, ImageFormat
from chainmerge.chain.reading import open_image
from chainmerge.qcow2.errors import BadHeader
from chainmerge.qcow2.table_errors import BadBitmapDirectory
from chainmerge.storage.errors import ImageMissing, WrongFileType
from chainmerge.storage.files import FileReadable
from tests.chain.overlays import SIZE, overlay, raw
from tests.chain.unchanged import refusal, unchanged
from tests.support import qemu

PLAIN = ChainPolicy()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A directory with the chain base <- middle <- top."""
    directory = tmp_path / "images"
    directory.mkdir()
    qemu.create(directory / "base", SIZE)
    overlay(directory / "middle", "base")
    overlay(directory / "top", "middle")
    return directory


def names(top: Path, policy: ChainPolicy = PLAIN) -> list[str]:
    return [image.path.name for image in discover(top, policy).images]


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


# Places


def outside(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    return qemu.create(tmp_path / "elsewhere" / "deep" / "secret", SIZE)


@pytest.mark.parametrize("absolute", [True, False])
def test_a_backing_file_elsewhere_is_refused(
    images: Path, tmp_path: Path, *, absolute: bool
) -> None:
    secret = outside(tmp_path)
    name = str(secret) if absolute else "../elsewhere/deep/secret"
    overlay(images / "thief", name)
    error = refusal(BackingFileOutside, tmp_path, lambda: discover(images / "thief", PLAIN))
    assert error.name == name
    assert error.how == f"is {str(secret)!r}"
    assert f"--allow-backing {secret.parent}" in error.advice


def test_a_link_to_elsewhere_is_refused(images: Path, tmp_path: Path) -> None:
    secret = outside(tmp_path)
    (images / "hop").symlink_to("link")
    (images / "link").symlink_to(secret)
    overlay(images / "thief", "hop")
    error = refusal(BackingFileOutside, tmp_path, lambda: discover(images / "thief", PLAIN))
    assert error.how == f"is a symbolic link to {str(secret)!r}"
    assert error.suggestion == str(secret.parent)


def test_a_directory_below_is_elsewhere_too(images: Path) -> None:
    (images / "sub").mkdir()
    qemu.create(images / "sub" / "base", SIZE)
    overlay(images / "thief", "sub/base")
    refusal(BackingFileOutside, images, lambda: discover(images / "thief", PLAIN))


def test_a_linked_directory_is_judged_by_what_it_is(images: Path, tmp_path: Path) -> None:
    secret = outside(tmp_path)
    (images / "here").symlink_to(secret.parent)
    overlay(images / "thief", "here/../deep/secret")
    error = refusal(BackingFileOutside, tmp_path, lambda: discover(images / "thief", PLAIN))
    assert error.how == f"is {str(secret)!r}"


@pytest.mark.parametrize(
    "allowed", ["elsewhere/deep", "elsewhere", "elsewhere/deep/secret", "link"]
)
def test_allowed_places(images: Path, tmp_path: Path, allowed: str) -> None:
    secret = outside(tmp_path)
    (tmp_path / "link").symlink_to(secret)
    overlay(images / "overlay", secret)
    policy = ChainPolicy(allow_backing=(tmp_path / allowed,))
    assert names(images / "overlay", policy) == ["secret", "overlay"]


def test_what_is_allowed_does_not_cover_its_neighbours(images: Path, tmp_path: Path) -> None:
    secret = outside(tmp_path)
    overlay(images / "overlay", secret)
    (tmp_path / "elsewhere" / "dee").mkdir()
    policy = ChainPolicy(allow_backing=(tmp_path / "elsewhere" / "dee",))
    refusal(BackingFileOutside, tmp_path, lambda: discover(images / "overlay", policy))


def test_links_in_one_directory_to_images_in_another(images: Path, tmp_path: Path) -> None:
    """The directory of the link and that of the file at its end both count."""
    links = tmp_path / "links"
    links.mkdir()
    (links / "top").symlink_to(overlay(images / "absolute", images / "base"))
    assert names(links / "top") == ["base", "top"]


# Formats


def test_an_undeclared_qcow2_backing_file_is_noted(images: Path) -> None:
    overlay(images / "undeclared", "middle", None)
    chain = discover(images / "undeclared", PLAIN)
    assert [image.format_declared for image in chain.images] == [True, False, False]
    assert chain.base.format == ImageFormat.QCOW2
    assert chain.base.notes == (
        "the image above does not declare its format; it begins like a qcow2 image",
    )


def test_an_undeclared_raw_backing_file_is_not_guessed(images: Path) -> None:
    raw(images / "disk")
    overlay(images / "undeclared", "disk", None)
    error = refusal(FormatMissing, images, lambda: discover(images / "undeclared", PLAIN))
    assert f"--format {images / 'disk'}=raw" in error.advice
    relink = f"relink {images / 'undeclared'} --backing {images / 'disk'} --format"
    assert f"`chainmerge {relink} {images / 'disk'}=raw`" in error.advice

    policy = ChainPolicy(formats={images / "disk": "raw"})
    root = discover(images / "undeclared", policy).root
    assert (root.format, root.format_declared, root.notes) == ("raw", True, ())


def test_an_explicit_format_goes_for_every_name_of_the_image(images: Path) -> None:
    raw(images / "disk")
    (images / "link").symlink_to("disk")
    overlay(images / "undeclared", "link", None)
    policy = ChainPolicy(formats={images / "disk": "raw"})
    assert discover(images / "undeclared", policy).root.format == "raw"


def test_declared_raw_stays_raw_whatever_the_guest_wrote(images: Path) -> None:
    shutil.copy(images / "base", images / "disk")
    overlay(images / "declared", "disk", "raw")
    root = discover(images / "declared", PLAIN).root
    assert root.format == ImageFormat.RAW
    assert root.file_size == (images / "disk").stat().st_size
    assert root.file_size <= root.virtual_size < root.file_size + 512
    assert root.notes == ("its content begins like a qcow2 image, but it is declared as raw",)


def test_an_explicit_format_must_not_contradict_the_declared_one(images: Path) -> None:
    policy = ChainPolicy(formats={images / "base": "raw"})
    error = refusal(FormatContradiction, images, lambda: discover(images / "top", policy))
    assert (error.child, error.declared, error.given) == (str(images / "middle"), "qcow2", "raw")


@pytest.mark.parametrize("content", [b"", b"QFI", b"\xfbIFQ", b"\x8f\x1e\xa3\x00\x5c\xff\x07\xd2"])
def test_declared_qcow2_and_something_else(images: Path, content: bytes) -> None:
    (images / "base").write_bytes(content)
    error = refusal(WrongFormat, images, lambda: discover(images / "top", PLAIN))
    assert (error.image, error.declared_by) == (str(images / "base"), str(images / "middle"))


def test_a_damaged_header_is_refused(images: Path) -> None:
    os.truncate(images / "base", 4096)
    error = refusal(BadHeader, images, lambda: discover(images / "top", PLAIN))
    assert error.image == str(images / "base")


def test_the_image_asked_for_must_be_qcow2_unless_told(images: Path) -> None:
    raw(images / "disk")
    error = refusal(TopFormatUnknown, images, lambda: discover(images / "disk", PLAIN))
    assert f"--format {images / 'disk'}=raw" in error.advice
    policy = ChainPolicy(formats={images / "disk": "raw"})
    assert discover(images / "disk", policy).top.format == "raw"
    policy = ChainPolicy(formats={images / "disk": "qcow2"})
    refusal(WrongFormat, images, lambda: discover(images / "disk", policy))


def test_a_foreign_format_is_the_end_of_what_is_known(images: Path) -> None:
    qemu.create(images / "foreign", SIZE, fmt="vmdk")
    qemu.create(images / "on-foreign", backing=images / "foreign", backing_format="vmdk")
    root = discover(images / "on-foreign", PLAIN).root
    assert root.foreign
    assert (root.format, root.backing, root.header) == ("vmdk", None, None)
    error = refusal(ForeignFormat, images, lambda: root.virtual_size)
    assert error.format == "vmdk"


# External data files


def test_an_external_data_file_must_be_named(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images)
    qemu.create(images / "split", SIZE, data_file="data")
    error = refusal(DataFileRefused, images, lambda: discover(images / "split", PLAIN))
    assert error.name == "data"
    raw(images / "other")
    policy = ChainPolicy(allow_data_files=(images / "other",))
    refusal(DataFileRefused, images, lambda: discover(images / "split", policy))

    policy = ChainPolicy(allow_data_files=(images / "other", images / "data"))
    assert discover(images / "split", policy).top.data_file == images / "data"
    monkeypatch.chdir(tmp_path)
    policy = ChainPolicy(allow_data_files=(Path("images/data"),))
    assert discover(images / "split", policy).top.data_file == images / "data"
    assert discover(images / "top", policy).top.data_file is None


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


# Images that the user has named


def test_an_image_that_is_named_is_allowed_by_whatever_name(images: Path, tmp_path: Path) -> None:
    secret = outside(tmp_path)
    (images / "link").symlink_to(secret)
    (tmp_path / "other-name").symlink_to(secret)
    for name in (str(secret), "link", "../elsewhere/deep/secret"):
        overlay(images / "over", name)
        for named in (secret, tmp_path / "other-name", images / "link"):
            chain = discover(images / "over", ChainPolicy(named=(named,)))
            assert chain.root.real_path == secret


def test_nothing_else_is_allowed_by_that(images: Path, tmp_path: Path) -> None:
    secret = outside(tmp_path)
    qemu.create(secret.parent / "beside", SIZE)
    policy = ChainPolicy(named=(secret,))
    overlay(images / "over", secret.parent / "beside")
    refusal(BackingFileOutside, tmp_path, lambda: discover(images / "over", policy))
    # Not what the image names that is named, either.
    overlay(secret.parent / "named", "beside")
    overlay(images / "over", secret.parent / "named")
    policy = ChainPolicy(named=(secret.parent / "named",))
    error = refusal(BackingFileOutside, tmp_path, lambda: discover(images / "over", policy))
    assert error.image == str(secret.parent / "named")
    # Nor by a directory that is named as if it was one.
    overlay(images / "over", secret)
    policy = ChainPolicy(named=(secret.parent,))
    refusal(BackingFileOutside, tmp_path, lambda: discover(images / "over", policy))


def test_a_link_that_is_turned_after_the_look_is_not_followed(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, named = outside(tmp_path), qemu.create(tmp_path / "named", SIZE)
    (images / "link").symlink_to(named)
    overlay(images / "over", "link")
    opening = FileReadable.__init__

    def turning(self: FileReadable, path: Path) -> None:
        if Path(path).name == "link":
            (images / "link").unlink()
            (images / "link").symlink_to(secret)
        opening(self, path)

    monkeypatch.setattr(FileReadable, "__init__", turning)
    with pytest.raises(BackingFileOutside):
        discover(images / "over", ChainPolicy(named=(named,)))
