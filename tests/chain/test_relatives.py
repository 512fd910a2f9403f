# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct
from msgspec.structs import replace

from chainmerge.chain.discovery import discover
from chainmerge.chain.errors import (
    ActiveElsewhere,
    BackingFileOutside,
    SearchPathUnusable,
    TooManyFiles,
)
from chainmerge.chain.model import ChainPolicy
from chainmerge.chain.relatives import Relatives, find_relatives
from chainmerge.chain.surroundings import MAX_AROUND
from chainmerge.documents.images import Searched
from tests.chain.overlays import SIZE, overlay, raw
from tests.chain.unchanged import refusal, unchanged
from tests.support import qemu

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chainmerge.chain.model import ImageInfo
    from chainmerge.chain.relatives import ImageAbove

NONE = Relatives((), (), (), (), (), (), frozenset(), Searched())


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A directory with the chain base <- middle <- top."""
    directory = tmp_path / "images"
    directory.mkdir()
    qemu.create(directory / "base", SIZE)
    overlay(directory / "middle", "base")
    overlay(directory / "top", "middle")
    return directory


def relatives_of(
    top: Path,
    base: str | None = None,
    search: tuple[Path, ...] = (),
    active: Path | None = None,
    policy: ChainPolicy | None = None,
    max_around: int = MAX_AROUND,
) -> Relatives:
    """The relatives of a chain from *base* (a name beside top; else top's backing file) to top."""
    chain = discover(top, policy or ChainPolicy())
    base_index = chain.base_index if base is None else chain.index_of(top.parent / base)
    with unchanged(top.parent):
        return find_relatives(
            chain, base_index, search, active, policy=policy, max_around=max_around
        )


def are_none(found: Relatives) -> bool:
    return replace(found, searched=Searched()) == NONE


def names(found: Iterable[ImageInfo]) -> list[str]:
    return [image.path.name for image in found]


def above(found: Iterable[ImageAbove]) -> list[tuple[str, list[str]]]:
    return [(one.image.path.name, [path.name for path in one.between]) for one in found]


def test_a_chain_that_nobody_else_uses(images: Path) -> None:
    qemu.create(images / "stranger", SIZE)
    raw(images / "disk")
    (images / "notes.txt").write_text("QFI")
    (images / "empty").touch()
    assert are_none(relatives_of(images / "top"))
    assert are_none(relatives_of(images / "top", "base"))


def test_siblings_children_and_middle_children(images: Path) -> None:
    for name, backing in [
        ("of-top-1", "top"),
        ("of-top-2", f"{images}/top"),
        ("of-middle", "./middle"),
        ("of-base", f"file:{images}/base"),
    ]:
        overlay(images / name, backing)
    one_step = relatives_of(images / "top")
    assert names(one_step.siblings) == ["of-middle"]
    assert names(one_step.middle_children) == []
    assert names(one_step.children) == ["of-top-1", "of-top-2"]
    two_steps = relatives_of(images / "top", "base")
    assert names(two_steps.siblings) == ["of-base"]
    assert names(two_steps.middle_children) == ["of-middle"]
    assert two_steps.children == one_step.children
    assert two_steps.siblings[0].backing == images / "base"
    assert two_steps.unreadable == ()


def test_what_stands_on_the_children(images: Path) -> None:
    overlay(images / "x", "top")
    overlay(images / "y", "x")
    overlay(images / "z", "y")
    overlay(images / "a", "top")
    qemu.qemu_img("bitmap", "--add", images / "z", "monday")
    found = relatives_of(images / "top")
    assert names(found.children) == ["a", "x"]
    assert above(found.above) == [("a", []), ("x", []), ("y", ["x"]), ("z", ["y", "x"])]
    assert [entry.name for entry in found.above[-1].image.bitmaps] == ["monday"]


def test_a_cycle_above_comes_to_an_end(images: Path) -> None:
    overlay(images / "x", "top")
    overlay(images / "y", "x")
    (images / "sub").mkdir()
    # By its name in the other directory, x stands on y.
    (images / "sub" / "x").hardlink_to(images / "x")
    (images / "sub" / "top").hardlink_to(images / "y")
    found = relatives_of(images / "top", search=(images / "sub",))
    assert above(found.above) == [("x", []), ("y", ["x"])]


def test_users_by_other_names_count_once(images: Path) -> None:
    overlay(images / "child", "alias")
    (images / "alias").symlink_to("top")
    (images / "child-hard").hardlink_to(images / "child")
    (images / "child-soft").symlink_to("child")
    (images / "top-hard").hardlink_to(images / "top")
    found = relatives_of(images / "top")
    assert names(found.children) == ["child"]
    assert found.siblings == ()


def test_a_user_that_only_one_of_its_names_makes_one(images: Path, tmp_path: Path) -> None:
    """The same file, opened by another name, can have another backing file."""
    (tmp_path / "other").mkdir()
    overlay(tmp_path / "other" / "z", "top")
    (images / "z").symlink_to(tmp_path / "other" / "z")
    assert names(relatives_of(images / "top").children) == ["z"]


def test_users_that_would_be_refused_in_a_chain_are_seen(images: Path) -> None:
    overlay(images / "driver", f"host_device:{images}/top")
    name = f'json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{images}/top"}}}}'
    overlay(images / "json", "-" * len(name))
    content = (images / "json").read_bytes().replace(b"-" * len(name), name.encode())
    (images / "json").write_bytes(content)
    overlay(images / "nothing", "nbd:localhost:1")
    assert names(relatives_of(images / "top").children) == ["driver", "json"]


def test_directories_searched(images: Path, tmp_path: Path) -> None:
    for name in ("far", "near"):
        (tmp_path / name / "below").mkdir(parents=True)
        overlay(tmp_path / name / name, images / "top")
        overlay(tmp_path / name / "below" / "deep", images / "top")
    (tmp_path / "near" / "link-to-top").symlink_to(images / "top")
    alone = partial(relatives_of, max_around=0)
    assert are_none(alone(images / "top"))
    far = tmp_path / "far"
    found = alone(images / "top", search=(far,))
    assert names(found.children) == ["deep", "far"]
    assert found.searched.named == (str(far),)
    assert names(alone(images / "top", search=(far / "below" / "deep",)).children) == ["deep"]
    # The directory of the path given for top counts as well as that of the file itself.
    (tmp_path / "near" / "middle").symlink_to(images / "middle")
    (tmp_path / "near" / "base").symlink_to(images / "base")
    overlay(images / "beside", "top")
    assert names(alone(tmp_path / "near" / "link-to-top").children) == ["beside", "near"]


def test_what_lies_beside_and_below_is_looked_at_too(images: Path, tmp_path: Path) -> None:
    for place in ("images/1/2/3", "beside/1/2", "beside"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        overlay(tmp_path / place / "child", images / "top")
    for place in ("images/1/2/3/4", "beside/1/2/3"):
        (tmp_path / place).mkdir()
        overlay(tmp_path / place / "too-deep", images / "top")
    (tmp_path / "beside" / "linked").symlink_to(tmp_path / "beside" / "1" / "2" / "3")
    found = relatives_of(images / "top")
    assert {str(image.path.parent.relative_to(tmp_path)) for image in found.children} == {
        "beside",
        "beside/1/2",
        "images/1/2/3",
    }
    assert found.searched.directories[0] == str(images)
    assert found.searched.around == (str(tmp_path),)
    # Other machines may run on this host.
    assert not any(str(tmp_path) in one for one in found.searched.left_out)


def test_where_a_search_stops_is_said(images: Path, tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"vm-{number}").mkdir()
        overlay(tmp_path / f"vm-{number}" / "child", images / "top")
    found = relatives_of(images / "top", max_around=8)
    assert len(found.children) == 2
    said = f"{tmp_path}/vm-2 and others (search stopped after 8 files)"
    assert said in found.searched.left_out


def test_a_directory_that_cannot_be_searched(images: Path) -> None:
    chain = discover(images / "top", ChainPolicy())
    (images / "loop").symlink_to("loop")
    for path in (images / "missing" / "directory", images / "loop"):
        search = partial(find_relatives, chain, 1, [path])
        error = refusal(SearchPathUnusable, images, search)
        assert error.path == str(path)


def test_the_number_of_files_is_limited(images: Path) -> None:
    chain = discover(images / "top", ChainPolicy())
    (images.parent / "alias").symlink_to("images")
    assert are_none(find_relatives(chain, 1, [images.parent / "alias"], max_files=3))
    (images / "fourth").touch()
    error = refusal(TooManyFiles, images, lambda: find_relatives(chain, 1, max_files=3))
    assert (error.directory, error.limit) == (str(images), 3)


def test_what_cannot_be_read_is_named(images: Path) -> None:
    overlay(images / "cut", "top")
    os.truncate(images / "cut", 4096)
    (images / "dangling").symlink_to("nothing")
    os.mkfifo(images / "pipe")
    found = relatives_of(images / "top")
    assert found.children == ()
    assert [path for path, _ in found.unreadable] == [images / "cut"]
    assert all(reason for _, reason in found.unreadable)
    # QEMU does not open it either.
    assert found.unknown == set()


def test_what_could_not_be_looked_at_is_not_taken_for_a_stranger(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay(images / "child", "top")
    pread = os.pread

    def failing(fd: int, length: int, offset: int) -> bytes:
        if Path(f"/proc/self/fd/{fd}").readlink() == images / "child":
            raise OSError(errno.EIO, "Input/output error")
        return pread(fd, length, offset)

    monkeypatch.setattr(os, "pread", failing)
    found = relatives_of(images / "top")
    assert found.children == ()
    assert found.unknown == {images / "child"}


def test_a_child_with_broken_bitmaps_is_still_a_child(images: Path) -> None:
    overlay(images / "child", "top")
    qemu.qemu_img("bitmap", "--add", images / "child", "monday")
    content = bytearray((images / "child").read_bytes())
    name = content.index(b"monday")
    content[name - 6 : name - 4] = b"\xff\xff"
    (images / "child").write_bytes(content)
    (child,) = relatives_of(images / "top").children
    assert child.bitmaps_trusted
    assert child.bitmaps_problem is not None


# With the upper end of the chain given


def test_images_above_are_found_from_the_active_one(images: Path, tmp_path: Path) -> None:
    for name in ("m", "n"):
        (tmp_path / name).mkdir()
    overlay(tmp_path / "m" / "x", images / "top")
    overlay(tmp_path / "n" / "active", "../m/x")
    chain = discover(images / "top", ChainPolicy())
    assert are_none(find_relatives(chain, 1, max_around=0))

    active = tmp_path / "n" / "active"
    policy = ChainPolicy(allow_backing=(tmp_path / "m",))
    found = relatives_of(images / "top", active=active, policy=policy)
    assert above(found.above) == [("x", []), ("active", ["x"])]
    assert names(found.children) == ["x"]
    assert found.children[0].path == tmp_path / "m" / "x"
    error = refusal(BackingFileOutside, tmp_path, lambda: find_relatives(chain, 1, active=active))
    assert error.image == str(active)


def test_the_active_image_need_not_be_told_what_the_chain_was_told(images: Path) -> None:
    raw(images / "disk")
    overlay(images / "over", "disk", None)
    overlay(images / "active", "over")
    policy = ChainPolicy(formats={images / "disk": "raw"})
    chain = discover(images / "over", policy)
    assert names(find_relatives(chain, 0, active=images / "active").children) == ["active"]


def test_top_itself_may_be_the_active_image(images: Path) -> None:
    (images / "alias").hardlink_to(images / "top")
    assert relatives_of(images / "top", active=images / "top").above == ()
    assert relatives_of(images / "top", active=images / "alias").above == ()


@pytest.mark.parametrize("active", ["middle", "stranger"])
def test_an_active_image_of_another_chain(images: Path, active: str) -> None:
    qemu.create(images / "stranger", SIZE)
    chain = discover(images / "top", ChainPolicy())
    error = refusal(
        ActiveElsewhere, images, lambda: find_relatives(chain, 1, active=images / active)
    )
    assert (error.active, error.top) == (str(images / active), str(images / "top"))


# Against a model


class Tree(Struct, frozen=True):
    """Images by number; image i stands on ``parents[i]`` < i. Image 0 has no backing file."""

    parents: tuple[int, ...]
    top: int
    base_steps: int

    def line(self, image: int) -> list[int]:
        """From an image down to the root."""
        return [image] if image == 0 else [image, *self.line(self.parents[image])]

    def users(self, image: int) -> list[int]:
        return [user for user in range(1, len(self.parents)) if self.parents[user] == image]


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    count = draw(st.integers(2, 9))
    parents = [0] + [draw(st.integers(max(0, i - 4), i - 1)) for i in range(1, count)]
    top = draw(st.integers(1, count - 1))
    tree = Tree(tuple(parents), top, 0)
    return Tree(tree.parents, top, draw(st.integers(1, len(tree.line(top)) - 1)))


@given(tree=trees())
def test_relatives_of_any_tree(tree: Tree) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch).resolve()
        qemu.create(root / "0", 512, cluster_size=512)
        template = overlay(root / "template", "0").read_bytes()
        (root / "template").unlink()
        for image in range(1, len(tree.parents)):
            content = bytearray(template)
            name_offset = int.from_bytes(content[8:16], "big")
            content[name_offset] = ord(str(tree.parents[image]))
            (root / str(image)).write_bytes(content)
        chain = discover(root / str(tree.top), ChainPolicy())
        found = find_relatives(chain, len(chain.images) - 1 - tree.base_steps)

    line = tree.line(tree.top)
    between = line[1 : tree.base_steps]

    def outside(image: int) -> list[int]:
        return [user for user in tree.users(image) if user not in line]

    def numbers(images: Iterable[ImageInfo]) -> list[int]:
        return [int(image.path.name) for image in images]

    def all_above(image: int) -> set[int]:
        return {one for user in outside(image) for one in (user, *all_above(user))}

    assert numbers(found.siblings) == outside(line[tree.base_steps])
    assert set(numbers(found.beside)) == {
        above for image in line[1 : tree.base_steps + 1] for above in all_above(image)
    }
    assert sorted(numbers(found.middle_children)) == sorted(
        user for image in between for user in outside(image)
    )
    assert numbers(found.children) == tree.users(tree.top)
    standing = [i for i in range(len(tree.parents)) if tree.top in tree.line(i)[1:]]
    assert {
        int(one.image.path.name): [int(path.name) for path in one.between] for one in found.above
    } == {image: tree.line(image)[1 : tree.line(image).index(tree.top)] for image in standing}
    assert len(found.above) == len(standing)
    assert found.unreadable == ()


def test_a_copy_is_no_link(images: Path) -> None:
    """Copies of chain images are images of their own, with the same backing name."""
    shutil.copy(images / "top", images / "top-copy")
    assert names(relatives_of(images / "top").siblings) == ["top-copy"]
