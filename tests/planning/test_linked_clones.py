# SPDX-License-Identifier: Apache-2.0
"""Machines with a directory each that share a base: whatever is merged, the others notice nothing.

Nobody can know who uses an image. So what is found is protected, what could be anywhere is not
risked unasked, and it is always said where was looked.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from msgspec import Struct
from msgspec.structs import replace

import chainmerge
from chainmerge.chain.errors import BackingFileOutside
from chainmerge.chain.target import find_target
from chainmerge.chain.unseen_users import UsersUnknown, VolumesInactive
from chainmerge.documents.images import LEVELS
from chainmerge.errors import ExitCode, Refused
from chainmerge.options import Access, DirectionChoice, MergeOptions
from chainmerge.planning.errors import BaseHasOtherChildren, DoomedInUse, MiddleHasOtherChildren
from chainmerge.storage import lvm
from chainmerge.storage.locks import LockMode, lock_image
from tests.chain.unchanged import refusal, state
from tests.support.cli import chainmerge as command
from tests.support.fake_lvm import FakeLvm
from tests.support.images import MIB
from tests.support.loopdev import loop_device
from tests.support.qemu import assert_clean, bitmap_names, content, create, qemu_img, qemu_io
from tests.support.surgery import mark_bitmap_in_use

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.chain.model import ImageInfo


class Clones(Struct, frozen=True):
    """A base that others share, and what stands on it, each in a directory of its own."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "9000" / "base"

    @property
    def access(self) -> Access:
        return Access(allow_backing=(str(self.base.parent),))

    def machine(self, number: int, below: str = "../9000/base") -> Path:
        (self.root / str(number)).mkdir(exist_ok=True)
        image = create(self.root / str(number) / f"vm-{number}", backing=below)
        qemu_io(image, f"write -P {number % 256} {number % 8 * 64}k 64k")
        return image


@pytest.fixture
def clones(tmp_path: Path) -> Clones:
    made = Clones(tmp_path / "images")
    made.base.parent.mkdir(parents=True)
    create(made.base, MIB)
    qemu_io(made.base, "write -P 1 0 256k")
    return made


@pytest.mark.parametrize("options", [MergeOptions(), MergeOptions(keep_name=True, delete=True)])
def test_a_clone_in_another_directory_is_seen(clones: Clones, options: MergeOptions) -> None:
    top, other = clones.machine(101), clones.machine(102)
    error = refusal(
        BaseHasOtherChildren,
        clones.root,
        lambda: chainmerge.merge(top, access=clones.access, options=options),
    )
    assert error.others == str(other)


def test_what_is_needed_by_a_clone_is_not_deleted_by_a_pull(clones: Clones) -> None:
    top, other = clones.machine(101), clones.machine(102)
    shown = content(other), content(top)
    delete = MergeOptions(direction="pull", delete=True)
    refusal(
        DoomedInUse,
        clones.root,
        lambda: chainmerge.merge(top, access=clones.access, options=delete),
    )
    other.unlink()
    refusal(
        UsersUnknown,
        clones.root,
        lambda: chainmerge.merge(top, access=clones.access, options=delete),
    )
    clones.machine(102)
    chainmerge.merge(top, access=clones.access, options=MergeOptions(direction="pull"))
    assert (content(other), content(top)) == shown


def test_a_base_that_others_may_stand_on_keeps_its_name(clones: Clones) -> None:
    """It holds all of top's data already: its content does not change, but where it is does."""
    top = clones.machine(101)
    access = replace(clones.access, sole_user=True)
    chainmerge.merge(top, access=access)
    keep_name = MergeOptions(keep_name=True, direction="commit")
    refusal(
        UsersUnknown,
        clones.root,
        lambda: chainmerge.merge(top, access=clones.access, options=keep_name),
    )


def test_a_base_elsewhere_is_written_to_only_if_somebody_vouches_for_it(clones: Clones) -> None:
    top = clones.machine(101)
    shown = content(top)
    merging = ("merge", "--allow-backing", clones.base.parent, top)
    before = state(clones.root)
    ran = command(*merging)
    assert ran.status == ExitCode.REFUSED
    said = " ".join(ran.err.split())
    assert f"looked for them only in these places: {top.parent}, {clones.base.parent}" in said
    assert f"pull instead (--direction pull), which leaves {clones.base}" in said
    assert "users-unknown" in said
    plan = command("plan", "--json", *merging[1:])
    assert [one["code"] for one in plan.json["refusals"]] == ["users-unknown"]
    assert plan.json["searched"]["around"] == [str(clones.root)]
    assert plan.json["other_users"] == []
    assert state(clones.root) == before
    ran = command(*merging, "--search", clones.root)
    assert ran.status == ExitCode.DONE, ran
    assert f"all below {clones.root}" in ran.out
    assert content(top) == shown


def test_whose_user_says_that_there_are_no_others(clones: Clones) -> None:
    top = clones.machine(101)
    shown = content(top)
    report = chainmerge.merge(
        top, access=Access(allow_backing=(str(clones.base.parent),), sole_user=True)
    )
    assert report.plan is not None
    assert report.plan.searched.sole_user
    assert content(top) == shown


def test_who_is_seen_counts_whatever_is_said(clones: Clones) -> None:
    top, _ = clones.machine(101), clones.machine(102)
    access = Access(allow_backing=(str(clones.base.parent),), sole_user=True)
    refusal(BaseHasOtherChildren, clones.root, lambda: chainmerge.merge(top, access=access))


def test_a_child_found_further_away_is_re_pointed(clones: Clones, tmp_path: Path) -> None:
    top = clones.machine(101)
    child = clones.machine(102, below="../101/vm-101")
    far = tmp_path / "a" / "b" / "c" / "d"
    far.mkdir(parents=True)
    grandchild = create(far / "leaf", backing=child)
    shown = content(grandchild)
    access = Access(
        allow_backing=(str(clones.root),), search=(str(clones.root), str(tmp_path / "a"))
    )
    plan = chainmerge.plan(top, access=access)
    assert plan.other_users == (str(child),)
    assert [image.path for image in plan.images][-2:] == [str(child), str(grandchild)]
    report = chainmerge.merge(top, access=access, options=MergeOptions(delete=True))
    assert report.repointed == (str(child),)
    assert content(grandchild) == shown


@pytest.mark.parametrize("where", ["base", "middle"])
def test_of_a_range_the_images_between_count(clones: Clones, where: str) -> None:
    """They are void afterwards, or deleted."""
    lower, upper = clones.root / "lower", clones.root / "upper"
    lower.mkdir()
    upper.mkdir()
    base = create((lower if where == "base" else upper) / "base", MIB)
    middle = create((lower if where == "middle" else upper) / "middle", backing=base)
    top = create(upper / "top", backing=middle)
    qemu_io(top, "write -P 3 0 64k")
    access = Access(allow_backing=(str(clones.root),))
    error = refusal(UsersUnknown, clones.root, lambda: chainmerge.merge(top, base, access=access))
    assert error.images == str(base if where == "base" else middle)
    other = create(clones.root / "other", backing=middle)
    refusal(MiddleHasOtherChildren, clones.root, lambda: chainmerge.merge(top, base, access=access))
    other.unlink()
    chainmerge.merge(top, base, access=Access(allow_backing=access.allow_backing, sole_user=True))


def test_by_a_link_a_base_is_still_elsewhere(clones: Clones) -> None:
    top = clones.machine(101)
    (top.parent / "base").symlink_to(clones.base)
    qemu_img("rebase", "-u", "-F", "qcow2", "-b", "base", top)
    refusal(UsersUnknown, clones.root, lambda: chainmerge.merge(top, access=clones.access))
    # The directory itself may have another name.
    (clones.root / "alias").symlink_to("9000")
    inside = create(clones.base.parent / "top", backing="../alias/base")
    chainmerge.merge(inside, access=Access(allow_backing=(str(clones.root),)))


def test_of_several_disks_each_counts(clones: Clones) -> None:
    top = clones.machine(101)
    own = create(top.parent / "own", MIB)
    second = create(top.parent / "second", backing="own")
    refusal(
        UsersUnknown,
        clones.root,
        lambda: chainmerge.merge_disks([second, top], access=clones.access),
    )
    plan = chainmerge.plan_disks([second, top], access=clones.access)
    assert [disk.feasible for disk in plan.disks] == [True, False]
    assert own.exists()


def test_pruning_is_a_change_too(clones: Clones) -> None:
    chainmerge.bitmaps_add(clones.base, "old")
    top = clones.machine(101)
    refusal(UsersUnknown, clones.root, lambda: chainmerge.prune(top, access=clones.access))
    active = Access(allow_backing=(str(clones.base.parent),), active=str(top))
    refusal(UsersUnknown, clones.root, lambda: chainmerge.prune(top, access=active))
    searched = Access(allow_backing=(str(clones.base.parent),), search=(str(clones.root),))
    clone = clones.machine(102)
    chainmerge.bitmaps_add(clone, "old", access=clones.access)
    assert chainmerge.prune(top, access=searched).removed == ()
    clone.unlink()
    assert [one.name for one in chainmerge.prune(top, access=searched).removed] == ["old"]
    assert bitmap_names(clones.base) == {}


def test_nothing_to_prune_needs_no_word(clones: Clones) -> None:
    top = clones.machine(101)
    assert chainmerge.prune(top, access=clones.access).removed == ()


def test_repair_finishes_a_merge_only_if_somebody_vouches_for_it(clones: Clones) -> None:
    """A commit by another program that was interrupted has the same base."""
    qemu_img("resize", "-q", clones.base, "4M")
    qemu_img("bitmap", "--add", clones.base, "broken")
    mark_bitmap_in_use(clones.base, "broken")
    top = clones.machine(101)
    qemu_io(clones.base, "write -P 7 0 2M")
    qemu_io(top, "write -P 7 0 3M")
    shown = content(top)
    planned = chainmerge.plan_repair(clones.base, clones.access)
    assert "half-done-commit" in {one.kind for one in planned.findings}
    assert any("may have users anywhere" in one.sentence for one in planned.findings)
    report = chainmerge.repair(clones.base, clones.access)
    assert report.leaves_damage
    assert content(top) == shown
    assert content(clones.base)[2 * MIB :] == bytes(2 * MIB)


def test_with_top_in_use_elsewhere_nothing_is_lost(clones: Clones) -> None:
    """A child found in another directory is locked like one beside top."""
    top = clones.machine(101)
    child = clones.machine(102, below="../101/vm-101")
    access = Access(allow_backing=(str(clones.root),), search=(str(clones.root),), lock_wait=0.0)
    with lock_image(child, LockMode.WRITER, 0):
        before = state(clones.root)
        with pytest.raises(Refused):
            chainmerge.merge(top, access=access)
        assert state(clones.root) == before


# Images that the user names


def test_a_base_that_the_user_names_may_lie_anywhere(clones: Clones) -> None:
    top = clones.machine(101)
    shown = content(top)
    plan = chainmerge.plan(top, clones.base)
    assert [one.code for one in plan.refusals] == ["users-unknown"]
    chainmerge.merge(top, clones.base, access=Access(sole_user=True))
    assert content(top) == shown
    assert_clean(clones.base)


def test_a_top_and_an_active_image_that_the_user_names_may_lie_anywhere(clones: Clones) -> None:
    top = clones.machine(101)
    active = clones.machine(102, below="../101/vm-101")
    access = Access(active=str(active), sole_user=True)
    assert chainmerge.plan(top, clones.base, access=access).feasible
    listed = Access(active=str(active), allow_backing=clones.access.allow_backing)
    assert chainmerge.bitmaps_list(top, listed).rows == ()
    # What an image names beyond that is not allowed by it.
    with pytest.raises(BackingFileOutside):
        chainmerge.bitmaps_list(top, Access(active=str(active)))


# Logical volumes that are not active


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """A chain on what LVM says is a volume of a group in which others are not active."""
    (tmp_path / "lvm").mkdir()
    fake = FakeLvm(tmp_path / "lvm")
    fake.install(monkeypatch)
    rows = [
        {"vg_uuid": "V", "lv_path": f"/dev/vg/disk-{number:02}", "lv_active": ""}
        for number in range(13)
    ]
    # Of a pool that caches nothing, LVM tells a path that never exists.
    rows.append({**rows[0], "lv_path": "/dev/vg/cache", "lv_layout": "cache,pool"})
    fake.break_command("lvs", 0, "", _report(rows))
    with loop_device(tmp_path / "behind", 8 * MIB) as base:
        device = base.stat().st_rdev
        name = lvm.DeviceMapperName("vg-base", "V", "L")
        # Only what asks for neighbours takes the device for a volume.
        monkeypatch.setattr(
            "chainmerge.chain.activation.lvm",
            SimpleNamespace(
                device_mapper_name=lambda number: name if number == device else None,
                inactive_volumes=lvm.inactive_volumes,
            ),
        )
        create(base, MIB)
        (tmp_path / "images").mkdir()
        top = create(tmp_path / "images" / "top", backing=base)
        qemu_io(top, "write -P 3 0 64k")
        yield base, top


def _report(rows: list[dict[str, str]]) -> str:
    return json.dumps({"report": [{"lv": rows}]})


SAID = "13 logical volumes (/dev/vg/disk-00, /dev/vg/disk-01, /dev/vg/disk-02 and 10 more)"


def test_volumes_that_cannot_be_looked_at_are_in_the_way(
    group: tuple[Path, Path], tmp_path: Path
) -> None:
    base, top = group
    access = Access(allow_backing=("/dev",), search=(str(tmp_path),))
    error = refusal(VolumesInactive, top.parent, lambda: chainmerge.merge(top, access=access))
    assert error.volumes == SAID
    assert "--activate" in error.advice
    assert "--active" in error.advice
    shown = content(top)
    with pytest.raises(VolumesInactive):
        chainmerge.prune(_with_stale_bitmap(base, top), access=access)
    pull = chainmerge.plan(top, access=access, options=MergeOptions(direction="pull"))
    assert pull.feasible
    assert [one for one in pull.warnings if "logical volumes" in one] == [
        f"{SAID} could use these images: not examined"
    ]
    inspected = chainmerge.inspect(top, access).warnings
    assert [SAID in one for one in inspected if "logical volume" in one] == [True]
    assert content(top) == shown


def _with_stale_bitmap(base: Path, top: Path) -> Path:
    qemu_img("bitmap", "--add", "-f", "qcow2", base, "old")
    return top


@pytest.mark.parametrize("word", [{"active": True}, {"sole_user": True}], ids=str)
def test_who_names_the_leaf_needs_no_look_at_volumes(
    group: tuple[Path, Path], tmp_path: Path, word: dict[str, bool]
) -> None:
    _, top = group
    access = Access(
        allow_backing=("/dev",),
        search=(str(tmp_path),),
        active=str(top) if "active" in word else None,
        sole_user="sole_user" in word,
    )
    report = chainmerge.merge(top, access=access)
    assert [one for one in report.warnings if "logical volumes" in one] == [
        f"{SAID} could use these images: not examined"
    ]


# Any layout

PLACES = ("vms/1", "vms/2", "vms/3/disks", "base", "far/1/2/3", "far/1/2/4")


class Image(Struct, frozen=True):
    """Where an image is, and what it stands on: an image of a lower number, by one of its names."""

    place: str
    below: int
    called: str


class Layout(Struct, frozen=True):
    """Images in directories, of which one is merged into one below it."""

    images: tuple[Image, ...]
    top: int
    steps: int
    search: tuple[str, ...]
    sole_user: bool
    direction: DirectionChoice
    delete: bool

    def line(self, number: int) -> list[int]:
        """From an image down to the root."""
        return [number] if number == 0 else [number, *self.line(self.images[number].below)]

    @property
    def base(self) -> int:
        return self.line(self.top)[self.steps]

    def users(self, number: int) -> set[int]:
        """The images outside of top's line that stand on an image."""
        line = self.line(self.top)
        return {
            user
            for user in range(1, len(self.images))
            if self.images[user].below == number and user not in line
        }

    def is_searched(self, number: int) -> bool:
        """Whether an image lies where is looked: beside the chain's, and what the user names."""
        place = Path("/") / self.images[number].place
        if any(place.is_relative_to(Path("/") / named) for named in self.search):
            return True
        homes = {Path("/") / self.images[one].place for one in self.line(self.top)}
        roots = homes | {home.parent for home in homes}
        return any(
            place.is_relative_to(root) and len(place.relative_to(root).parts) <= LEVELS
            for root in roots
        )

    def found(self, number: int) -> set[int]:
        """The users of an image that are found."""
        return {user for user in self.users(number) if self.is_searched(user)}


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    count = draw(st.integers(2, 7))
    images = tuple(
        Image(
            draw(st.sampled_from(PLACES)),
            draw(st.integers(max(0, number - 3), max(0, number - 1))),
            draw(st.sampled_from(("relative", "absolute", "link"))),
        )
        for number in range(count)
    )
    top = draw(st.integers(1, count - 1))
    bare = Layout(images, top, 1, (), False, "commit", False)
    return Layout(
        images,
        top,
        draw(st.integers(1, len(bare.line(top)) - 1)),
        draw(st.sampled_from(((), (), ("",), ("far",), ("vms/2", "base")))),
        draw(st.sampled_from((False, False, True))),
        draw(st.sampled_from(("commit", "commit", "pull"))),
        draw(st.booleans()),
    )


def built(layout: Layout, root: Path) -> list[Path]:
    paths = [root / image.place / f"{number}.img" for number, image in enumerate(layout.images)]
    for number, (path, image) in enumerate(zip(paths, layout.images, strict=True)):
        path.parent.mkdir(parents=True, exist_ok=True)
        if number == 0:
            create(path, MIB)
        else:
            below = paths[image.below]
            name = os.path.relpath(below, path.parent)
            if image.called == "absolute":
                name = str(below)
            elif image.called == "link":
                (path.parent / f"link-{number}").symlink_to(below.parent)
                name = f"link-{number}/{below.name}"
            create(path, backing=name)
        qemu_io(
            path, f"write -P {number + 1} {number * 64}k 128k", f"write -P {number + 1} 900k 4k"
        )
    return paths


@given(layout=layouts())
def test_whatever_is_merged_the_others_notice_nothing(layout: Layout) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch).resolve() / "root"
        paths = built(layout, root)
        top, base = paths[layout.top], paths[layout.base]
        access = Access(
            allow_backing=(str(root),),
            search=tuple(str(root / named) for named in layout.search if (root / named).is_dir()),
            sole_user=layout.sole_user,
        )
        _assert_found(layout, paths, access)
        changed = {*layout.line(layout.top)[1 : layout.steps + 1]}
        if layout.direction == "pull" and not layout.delete:
            changed = set()
        unseen = {
            user
            for number in (*changed, layout.top)
            for user in layout.users(number)
            if not layout.is_searched(user)
        }
        away = any(layout.images[one].place != layout.images[layout.top].place for one in changed)
        vouched = bool(access.search) or access.sole_user
        if unseen and (vouched or not away):
            # Who says what is not so, or has clones of a chain that lies in one directory beyond
            # all that is searched, cannot be helped.
            event("users that nobody can know of")
            return
        shown = {number: content(path) for number, path in enumerate(paths)}
        before = state(root)
        options = MergeOptions(direction=layout.direction, delete=layout.delete)
        try:
            chainmerge.merge(top, base, access=access, options=options)
        except (
            UsersUnknown,
            BaseHasOtherChildren,
            MiddleHasOtherChildren,
            DoomedInUse,
        ) as error:
            event(f"refused: {error.code}")
            assert state(root) == before
            return
        event(f"merged by {layout.direction}")
        assert not away or vouched
        for number, path in enumerate(paths):
            if number not in changed:
                if number == layout.top and layout.direction == "commit" and layout.delete:
                    continue
                assert content(path) == shown[number], path


def _assert_found(layout: Layout, paths: list[Path], access: Access) -> None:
    line = layout.line(layout.top)
    relatives = find_target(paths[layout.top], paths[layout.base], access).relatives

    def numbers(images: tuple[ImageInfo, ...]) -> set[int]:
        return {int(image.real_path.stem) for image in images}

    assert numbers(relatives.siblings) == layout.found(layout.base)
    assert numbers(relatives.children) == layout.found(layout.top)
    assert numbers(relatives.middle_children) == {
        user for number in line[1 : layout.steps] for user in layout.found(number)
    }
