# SPDX-License-Identifier: Apache-2.0
"""Which files an image may lead to: places, formats, external data files."""

import os
import shutil
from pathlib import Path

import pytest

from chainmerge.chain.allowed_places import allowed_places_of
from chainmerge.chain.discovery import discover, walk_down
from chainmerge.chain.errors import (
    BackingFileOutside,
    DataFileRefused,
    ForeignFormat,
    FormatContradiction,
    FormatMissing,
    TopFormatUnknown,
    WrongFormat,
)
from chainmerge.chain.model import ChainPolicy, ImageFormat
from chainmerge.qcow2.errors import BadHeader
from chainmerge.storage.files import FileReadable
from tests.chain.discovery.small_chain import PLAIN, names
from tests.chain.overlays import SIZE, overlay, raw
from tests.chain.unchanged import refusal
from tests.support import qemu

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


def test_a_directory_that_becomes_another_one_is_judged_again(images: Path, tmp_path: Path) -> None:
    secret = outside(tmp_path)
    allowed = images / "allowed"
    allowed.mkdir()
    qemu.create(allowed / "secret", SIZE)
    overlay(allowed / "middle", "secret")
    overlay(images / "top", "allowed/middle")
    policy = ChainPolicy(allow_backing=(allowed,))
    places = allowed_places_of([images / "top"], policy)
    walk = walk_down(images / "top", policy, places)
    assert [next(walk).path.name for _ in range(2)] == ["top", "middle"]
    # By now it is known where the directory lies.
    allowed.rename(images / "old")
    allowed.symlink_to(secret.parent)
    with pytest.raises(BackingFileOutside) as caught:
        next(walk)
    assert str(secret) in caught.value.how


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


@pytest.mark.parametrize("fmt", ["vmdk", "qcow"])
def test_a_foreign_format_is_the_end_of_a_chain(images: Path, fmt: str) -> None:
    qemu.create(images / "foreign", SIZE, fmt=fmt)
    qemu.create(images / "on-foreign", backing=images / "foreign", backing_format=fmt)
    root = discover(images / "on-foreign", PLAIN).root
    assert root.foreign
    assert (root.format, root.backing, root.header) == (fmt, None, None)
    if fmt == "vmdk":
        assert root.virtual_size == SIZE
        # Nobody is going to read: QEMU is not asked.
        root = discover(images / "on-foreign", ChainPolicy(metadata_only=True)).root
    error = refusal(ForeignFormat, images, lambda: root.virtual_size)
    assert error.format == fmt


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
