# SPDX-License-Identifier: Apache-2.0
"""Logical volumes removed and renamed at the end of a merge, killed at every step.

``tests/vm/guest/test_removals.py`` does the same with LVM itself.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge.documents.merge import MergeOutcome
from chainmerge.options import Access, MergeOptions
from chainmerge.planning.errors import CannotDeleteVolume, CannotRenameVolume, CannotTakeAway
from chainmerge.records.unfinished import status
from chainmerge.storage.errors import ImageMissing
from chainmerge.storage.volume_errors import VolumeNotRemoved, VolumeNotRenamed
from tests.support.children import is_killed
from tests.support.lvm_images import DISK, MIB, Volumes, lvm_images
from tests.support.qemu import assert_clean, content, create, info, qemu_img, qemu_io

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEVICES = Access(allow_backing=("/dev",))
DELETE = MergeOptions(delete=True)
KEEP_NAME = MergeOptions(keep_name=True, direction="commit")


@pytest.fixture
def volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Volumes]:
    with lvm_images(tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture
def shown(volumes: Volumes) -> Callable[..., list[Path]]:
    """Make a chain, and let the kernel seem to know its volumes."""

    def make(*names: str) -> list[Path]:
        paths = volumes.chain(*names)
        volumes.show()
        return paths

    return make


def die_at(volumes: Volumes, command: str, moment: str) -> None:
    if moment == "before":
        volumes.lvm.kill_before(command)
    else:
        volumes.lvm.kill_after(command)


def nothing_is_left() -> bool:
    return not status([]).merges


# Removed


def test_the_merged_volume_is_removed(volumes: Volumes, shown: Callable[..., list[Path]]) -> None:
    base, top = shown("base-0", "top-1")
    expected = content(top)
    plan = chainmerge.plan(top, None, DEVICES, DELETE)
    assert plan.delete == (str(top),)
    assert plan.refusals == ()
    report = chainmerge.merge(top, None, DEVICES, DELETE)
    assert report.deleted == (str(top),)
    assert volumes.names() == {"base-0": volumes.uuids["base-0"]}
    assert content(base) == expected
    assert_clean(base)
    again = chainmerge.merge(top, None, DEVICES, DELETE)
    assert again.outcome is MergeOutcome.ALREADY_MERGED
    assert nothing_is_left()


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("named", ["directory", "mapper"])
def test_killed_as_a_volume_is_removed(
    volumes: Volumes, shown: Callable[..., list[Path]], moment: str, named: str
) -> None:
    base, middle, top = shown("base-0", "middle-1", "top-2")
    expected = content(top)
    given = top
    if named == "mapper":
        # A relative name counts from /dev/mapper then.
        qemu_img("rebase", "-u", "-f", "qcow2", "-b", middle, "-F", "qcow2", top)
        given = volumes.stack.enter_context(mapper_name(volumes, "top-2"))
    die_at(volumes, "lvremove", moment)
    assert is_killed(lambda: chainmerge.merge(given, base, DEVICES, DELETE))
    assert "middle-1" in volumes.names()
    assert not nothing_is_left()
    volumes.lvm.mend("lvremove")
    if moment == "after" and named == "mapper":
        given.unlink()
    report = chainmerge.merge(given, base, DEVICES, DELETE)
    assert report.outcome is MergeOutcome.ALREADY_MERGED
    assert volumes.names() == {"base-0": volumes.uuids["base-0"]}
    assert content(base) == expected
    assert_clean(base)
    assert nothing_is_left()


@contextlib.contextmanager
def mapper_name(volumes: Volumes, name: str) -> Iterator[Path]:
    mangled = "-".join(part.replace("-", "--") for part in (volumes.group, name))
    link = Path("/dev/mapper", mangled)
    link.symlink_to(os.path.realpath(volumes.path(name)))
    try:
        yield link
    finally:
        link.unlink(missing_ok=True)


def test_a_volume_made_anew_under_the_name_stays(
    volumes: Volumes, shown: Callable[..., list[Path]]
) -> None:
    base, middle, top = shown("base-0", "middle-1", "top-2")
    die_at(volumes, "lvremove", "after")
    assert is_killed(lambda: chainmerge.merge(top, base, DEVICES, DELETE))
    volumes.lvm.mend("lvremove")
    chainmerge.storage.lvm.run_command("x", "lvremove", "-y", "--", f"{volumes.group}/middle-1")
    volumes.lvm.make_anew(volumes.group, "middle-1", volumes.device("another"))
    volumes.show()
    new = volumes.names()["middle-1"]
    assert new != volumes.uuids["middle-1"]
    qemu_io(middle, "write -q -P 77 0 64k", fmt="raw")
    report = chainmerge.merge(top, base, DEVICES, DELETE)
    assert report.deleted == ()
    assert volumes.names() == {"base-0": volumes.uuids["base-0"], "middle-1": new}
    assert middle.read_bytes()[:65536] == bytes([77]) * 65536


@pytest.mark.parametrize("options", [DELETE, KEEP_NAME], ids=["delete", "keep-name"])
def test_a_top_that_is_not_active_is_not_taken_for_gone(
    volumes: Volumes, shown: Callable[..., list[Path]], options: MergeOptions
) -> None:
    """A guest may have written to it since, on another host or before it was deactivated."""
    base, top = shown("base-0", "top-1")
    die_at(volumes, "lvremove", "before")
    assert is_killed(lambda: chainmerge.merge(top, base, DEVICES, options))
    volumes.lvm.mend("lvremove")
    qemu_io(top, "write -q -P 55 3M 64k")
    expected = content(top)
    device = Path(os.path.realpath(top))
    volumes.lvm.take_down("top-1")
    with pytest.raises(ImageMissing):
        chainmerge.merge(top, base, DEVICES, options)
    assert volumes.names() == volumes.uuids
    volumes.lvm.activate_as("top-1", "exclusive")
    top.symlink_to(device)
    volumes.show()
    chainmerge.merge(top, base, DEVICES, options)
    assert content(top if options.keep_name else base) == expected


def test_a_merged_volume_that_is_not_active_is_left(
    volumes: Volumes, shown: Callable[..., list[Path]]
) -> None:
    base, middle, top = shown("base-0", "middle-1", "top-2")
    die_at(volumes, "lvremove", "after")
    assert is_killed(lambda: chainmerge.merge(top, base, DEVICES, DELETE))
    volumes.lvm.mend("lvremove")
    device = Path(os.path.realpath(middle))
    volumes.lvm.take_down("middle-1")
    report = chainmerge.merge(top, base, DEVICES, DELETE)
    assert [str(middle) in warning for warning in report.warnings] == [True]
    assert set(volumes.names()) == {"base-0", "middle-1"}
    middle.symlink_to(device)
    volumes.show()
    report = chainmerge.merge(top, base, DEVICES, DELETE)
    assert (report.deleted, report.warnings) == ((str(middle),), ())
    assert set(volumes.names()) == {"base-0"}


def test_a_volume_that_is_in_use_stays(volumes: Volumes, shown: Callable[..., list[Path]]) -> None:
    base, top = shown("base-0", "top-1")
    expected = content(top)
    with top.open("rb"), pytest.raises(VolumeNotRemoved) as caught:
        chainmerge.merge(top, base, DEVICES, DELETE)
    assert "in use" in caught.value.reason
    assert set(volumes.names()) == {"base-0", "top-1"}
    assert content(base) == content(top) == expected
    chainmerge.merge(top, base, DEVICES, DELETE)
    assert set(volumes.names()) == {"base-0"}
    assert content(base) == expected


def test_volumes_with_snapshots_of_lvm_are_not_removed(
    volumes: Volumes, shown: Callable[..., list[Path]]
) -> None:
    base, top = shown("base-0", "top-1")
    before = content(base)
    volumes.lvm.set_attributes("top-1", "owi-aos---")
    plan = chainmerge.plan(top, None, DEVICES, DELETE)
    assert [one.code for one in plan.refusals] == [CannotTakeAway.code]
    with pytest.raises(CannotTakeAway, match="LVM snapshots"):
        chainmerge.merge(top, None, DEVICES, DELETE)
    assert content(base) == before
    assert not volumes.lvm.calls("lvremove")


def test_a_device_that_is_no_logical_volume_is_refused(volumes: Volumes) -> None:
    base, top = volumes.chain("base-0", "top-1")
    with pytest.raises(CannotDeleteVolume):
        chainmerge.merge(top, base, DEVICES, DELETE)
    assert set(volumes.names()) == {"base-0", "top-1"}


@pytest.mark.parametrize("moment", ["before", "after", None])
@pytest.mark.parametrize("how", ["pull", "flatten"])
def test_what_was_pulled_up_is_removed(
    volumes: Volumes, shown: Callable[..., list[Path]], how: str, moment: str | None
) -> None:
    _, _, top = shown("base-0", "middle-1", "top-2")
    expected = content(top)

    def pull() -> chainmerge.MergeReport:
        if how == "flatten":
            return chainmerge.flatten(top, DEVICES, DELETE)
        options = MergeOptions(delete=True, direction="pull")
        return chainmerge.merge(top, volumes.path("base-0"), DEVICES, options)

    if moment is not None:
        die_at(volumes, "lvremove", moment)
        assert is_killed(pull)
        volumes.lvm.mend("lvremove")
        assert not nothing_is_left()
    pull()
    assert pull().outcome == "already-merged"
    assert volumes.names() == {"top-2": volumes.uuids["top-2"]}
    assert content(top) == expected
    assert_clean(top)
    assert nothing_is_left()


# Renamed


RENAME_STEPS = [
    (command, moment) for command in ("lvremove", "lvrename") for moment in ("before", "after")
]


def test_base_takes_over_the_name(volumes: Volumes, shown: Callable[..., list[Path]]) -> None:
    _, base, top, child = shown("root-0", "base-1", "top-2", "child-3")
    expected, above = content(top), content(child)
    plan = chainmerge.plan(top, None, DEVICES, KEEP_NAME)
    assert plan.rename == (str(base), str(top))
    assert plan.refusals == ()
    report = chainmerge.merge(top, None, DEVICES, KEEP_NAME)
    assert report.renamed == (str(base), str(top))
    assert volumes.names() == {
        "root-0": volumes.uuids["root-0"],
        "top-2": volumes.uuids["base-1"],
        "child-3": volumes.uuids["child-3"],
    }
    # As whoever manages the volumes wrote it.
    assert info(top)["backing-filename"] == "root-0"
    assert info(child)["backing-filename"] == "top-2"
    assert content(top) == expected
    assert content(child) == above
    assert_clean(top)
    again = chainmerge.merge(top, None, DEVICES, KEEP_NAME)
    assert again.outcome is MergeOutcome.ALREADY_MERGED
    assert volumes.names()["top-2"] == volumes.uuids["base-1"]
    assert nothing_is_left()


@pytest.mark.parametrize("delete", [False, True])
@pytest.mark.parametrize(("command", "moment"), RENAME_STEPS)
def test_killed_on_the_way_to_the_name(
    volumes: Volumes,
    shown: Callable[..., list[Path]],
    command: str,
    moment: str,
    *,
    delete: bool,
) -> None:
    _, base, _, top = shown("root-0", "base-1", "middle-2", "top-3")
    expected = content(top)
    options = MergeOptions(keep_name=True, delete=delete, direction="commit")
    die_at(volumes, command, moment)
    assert is_killed(lambda: chainmerge.merge(top, base, DEVICES, options))
    if (command, moment) != ("lvrename", "after"):
        assert not nothing_is_left()
    volumes.lvm.mend(command)
    chainmerge.merge(top, base, DEVICES, options)
    kept = {} if delete else {"middle-2": volumes.uuids["middle-2"]}
    assert volumes.names() == {
        "root-0": volumes.uuids["root-0"],
        "top-3": volumes.uuids["base-1"],
        **kept,
    }
    assert info(top)["backing-filename"] == "root-0"
    assert content(top) == expected
    assert_clean(top)
    assert nothing_is_left()


def test_a_name_that_somebody_took_meanwhile(
    volumes: Volumes, shown: Callable[..., list[Path]]
) -> None:
    base, top = shown("base-0", "top-1")
    expected = content(top)
    die_at(volumes, "lvrename", "before")
    assert is_killed(lambda: chainmerge.merge(top, base, DEVICES, KEEP_NAME))
    volumes.lvm.mend("lvrename")
    volumes.lvm.make_anew(volumes.group, "top-1", volumes.device("another"))
    volumes.show()
    # It is not an overlay, and nothing is done to it.
    with pytest.raises(chainmerge.ChainmergeError):
        chainmerge.merge(top, base, DEVICES, KEEP_NAME)
    assert volumes.names()["base-0"] == volumes.uuids["base-0"]
    assert content(base) == expected


def test_lvm_that_does_not_rename(volumes: Volumes, shown: Callable[..., list[Path]]) -> None:
    base, top = shown("base-0", "top-1")
    expected = content(top)
    volumes.lvm.break_command("lvrename", 5, "Volume group is locked by somebody.")
    with pytest.raises(VolumeNotRenamed, match="locked by somebody"):
        chainmerge.merge(top, base, DEVICES, KEEP_NAME)
    with pytest.raises(VolumeNotRenamed, match="locked by somebody"):
        chainmerge.merge(top, base, DEVICES, KEEP_NAME)
    volumes.lvm.mend("lvrename")
    report = chainmerge.merge(top, base, DEVICES, KEEP_NAME)
    assert report.renamed == (str(base), str(top))
    assert volumes.names() == {"top-1": volumes.uuids["base-0"]}
    assert content(top) == expected


def test_snapshot_after_snapshot_under_one_name(
    volumes: Volumes, shown: Callable[..., list[Path]]
) -> None:
    """The current image keeps its name, what is below it has that of the snapshot."""
    (disk,) = shown("vm-100-disk-0")
    for number in range(3):
        snapshot = f"snap_vm-100-disk-0_s{number}.qcow2"
        chainmerge.storage.lvm.run_command(
            "x", "lvrename", "--", volumes.group, "vm-100-disk-0", snapshot
        )
        volumes.lvm.make_anew(
            volumes.group, "vm-100-disk-0", volumes.device(f"overlay-{number}"), f"{number}"
        )
        volumes.show()
        create(disk, DISK, backing=snapshot)
        qemu_io(disk, f"write -q -P {number + 20} {number * 64}k 64k")
        expected = content(disk)
        report = chainmerge.merge(disk, None, DEVICES, KEEP_NAME)
        assert report.outcome is MergeOutcome.MERGED
        assert volumes.names() == {"vm-100-disk-0": volumes.uuids["vm-100-disk-0"]}
        assert content(disk) == expected


def test_names_in_a_directory_of_links(
    volumes: Volumes, shown: Callable[..., list[Path]], tmp_path: Path
) -> None:
    """As oVirt reaches volumes: UUIDs as names, and links in the image's directory."""
    names = ("8d6e1b0a-base", "1f0c77aa-top", "77aa1f0c-child")
    paths = shown(*names)
    place = tmp_path / "image"
    place.mkdir()
    links = [place / name for name in names]
    for link, path in zip(links, paths, strict=True):
        link.symlink_to(path)
    base, top, child = links
    above = content(child)
    report = chainmerge.merge(top, base, DEVICES, KEEP_NAME)
    assert report.deleted == (str(paths[1]), str(base))
    assert sorted(one.name for one in place.iterdir()) == sorted(names[1:])
    assert os.path.realpath(top) == os.path.realpath(paths[1])
    assert info(child)["backing-filename"] == names[1]
    assert content(child) == above
    again = chainmerge.merge(top, base, DEVICES, KEEP_NAME)
    assert again.outcome is MergeOutcome.ALREADY_MERGED


def test_another_group_is_refused(volumes: Volumes, shown: Callable[..., list[Path]]) -> None:
    base, top = shown("base-0", "top-1")
    other = f"{volumes.group}-other"
    volumes.lvm.add_group(other, 200, [], extent_size=MIB)
    volumes.lvm.move("base-0", other)
    volumes.show()
    before = content(base)
    with pytest.raises(CannotRenameVolume):
        chainmerge.merge(top, base, DEVICES, KEEP_NAME)
    assert content(base) == before


# With others


def test_the_site_locks_what_is_removed(
    volumes: Volumes, shown: Callable[..., list[Path]], tmp_path: Path
) -> None:
    base, top = shown("base-0", "top-1")
    log = tmp_path / "asked"
    command = shlex.join(["sh", "-c", f'echo "$@" >>{log}', "site"])
    access = Access(allow_backing=("/dev",), lock_command=command)
    chainmerge.merge(top, base, access, DELETE)
    asked = log.read_text(encoding="utf-8").splitlines()
    assert [line.split()[0] for line in asked] == ["lock", "unlock"]
    assert "top--1" in asked[0]


def test_several_disks(volumes: Volumes, shown: Callable[..., list[Path]]) -> None:
    base_0, top_0, base_1, top_1 = shown("base-0", "top-0", "base-1", "top-1")
    create(base_1, DISK)
    create(top_1, DISK, backing="base-1")
    qemu_io(top_1, "write -q -P 9 0 64k")
    expected = [content(top_0), content(top_1)]
    volumes.lvm.kill_after("lvrename")
    call = (top_0, top_1), (base_0, base_1), DEVICES, KEEP_NAME
    assert is_killed(lambda: chainmerge.merge_disks(*call))
    volumes.lvm.mend("lvrename")
    report = chainmerge.merge_disks(*call)
    assert all(disk.error is None for disk in report.disks)
    assert volumes.names() == {
        "top-0": volumes.uuids["base-0"],
        "top-1": volumes.uuids["base-1"],
    }
    assert [content(top_0), content(top_1)] == expected
    assert nothing_is_left()


def test_a_top_that_never_was_is_missing(
    volumes: Volumes, shown: Callable[..., list[Path]]
) -> None:
    shown("base-0", "top-1")
    with pytest.raises(ImageMissing):
        chainmerge.merge(volumes.path("nothing"), None, DEVICES, DELETE)
