# SPDX-License-Identifier: Apache-2.0
"""Merges on logical volumes, as LVM and the kernel really have them."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.qemu import (
    DirtyRange,
    assert_clean,
    bitmap_names,
    create,
    dirty_ranges,
    info,
    qemu_img,
    qemu_io,
    run,
)
from tests.vm.commands import chainmerge_forked
from tests.vm.guest.volumes import MIB, STALE, Group, fill

if TYPE_CHECKING:
    from tests.support.cli import Ran

KIB = 1 << 10


def add_bitmaps(image: Path, *names: str) -> None:
    for name in names:
        qemu_img("bitmap", "--add", "-f", "qcow2", image, name)


def assert_reads(image: Path, *pieces: tuple[int, int, int]) -> None:
    """Fail unless a guest reads these patterns, each (pattern, start, length)."""
    commands = [f"read -P {pattern} {start} {length}" for pattern, start, length in pieces]
    assert "verification failed" not in qemu_io(image, *commands, options=("-r",))


def merged(*arguments: str | Path) -> Ran:
    ran = chainmerge_forked("merge", "--json", *arguments)
    assert ran.status == 0, ran
    return ran


def refused(*arguments: str | Path) -> Ran:
    ran = chainmerge_forked("merge", *arguments)
    assert ran.status == 3, ran
    assert "Traceback" not in ran.err
    return ran


# The demo's scenario: base of 1 GiB on a volume of 128 MiB, full of bitmaps of deleted
# checkpoints, and a top with much data and the bitmap that the next backup needs.

DEMO_VOLUME, DEMO_DISK = 128 * MIB, 1024 * MIB


def demo(group: Group, stale: int, data: int) -> tuple[Path, Path]:
    base = create(group.create("base", DEMO_VOLUME), DEMO_DISK)
    add_bitmaps(base, *(f"stale-{number}" for number in range(stale)))
    top = create(group.create("top", data + 4 * MIB), backing=base)
    add_bitmaps(top, "good")
    qemu_io(top, f"write -q -P 90 0 {data}")
    return base, top


def assert_demo_merged(base: Path, data: int) -> None:
    assert_clean(base)
    assert {name: bitmap["flags"] for name, bitmap in bitmap_names(base).items()} == {
        "good": ["auto"]
    }
    assert dirty_ranges(base, "good") == [DirtyRange(0, data)]
    assert_reads(base, (90, 0, data), (0, data, DEMO_DISK - data))


def test_the_demo_extended_to_the_planned_size_and_reduced(group: Group) -> None:
    """With 14 stale bitmaps, on which `qemu-img commit` fails half way."""
    base, top = demo(group, 14, 130 * MIB)
    space = chainmerge_forked("plan", "--json", top).json["space"]
    merged(top)
    assert_demo_merged(base, 130 * MIB)
    extended = group.size_of("base")
    assert extended == space["grow_to"] > DEMO_VOLUME
    assert space["required"] <= extended < space["required"] + MIB
    # The guest drops half of it; with the next snapshot's merge the space goes back.
    qemu_io(base, "discard 64M 66M", options=("--discard", "unmap"))
    create(top, backing=base)
    add_bitmaps(top, "good")
    qemu_io(top, "write -P 91 0 64k")
    report = merged("--shrink", "--leave", "0", "--data", "in-place", top).json
    assert_clean(base)
    assert_reads(base, (91, 0, 64 * KIB), (90, 64 * KIB, MIB))
    assert group.size_of("base") == report["volume_size"] < DEMO_VOLUME
    assert report["image_end"] <= report["volume_size"] < report["image_end"] + MIB


@pytest.mark.soak
def test_the_demo_without_extension(group: Group) -> None:
    base, top = demo(group, 14, 126 * MIB)
    merged(top)
    assert_demo_merged(base, 126 * MIB)
    assert group.size_of("base") == DEMO_VOLUME


def test_more_than_the_group_has_is_refused_beforehand(group: Group) -> None:
    base = create(group.create("base", 4 * MIB), 32 * MIB)
    top = create(group.create("top", 32 * MIB), backing=base)
    qemu_io(top, "write -P 5 0 20M")
    run("lvcreate", "-q", "-y", "-Wn", "-l", "100%FREE", "-n", "ballast", group.name)
    before = base.read_bytes()
    ran = refused(top)
    assert re.search(r"its volume group lacks \d+ bytes", ran.err.replace("\n", " "))
    assert base.read_bytes() == before


# Names


def named(group: Group, volume: str, way: str) -> Path:
    match way:
        case "directory":
            return group.path(volume)
        case "mapper":
            return group.mapper_path(volume)
        case _:
            return group.path(volume).resolve()


@pytest.mark.parametrize(
    ("way", "backing"),
    [
        ("directory", "relative"),
        ("directory", "mapper"),
        ("mapper", "directory"),
        ("kernel", "directory"),
    ],
)
def test_whatever_a_volume_is_called(group: Group, way: str, backing: str) -> None:
    base = create(group.create("base-1", 8 * MIB), 4 * MIB)
    qemu_io(base, "write -P 1 0 1M")
    name = "base-1" if backing == "relative" else named(group, "base-1", backing)
    top = create(group.create("top-1", 8 * MIB), backing=name)
    qemu_io(top, "write -P 2 512k 1M")
    below = "top-1" if backing == "relative" else group.mapper_path("top-1")
    child = create(group.create("child-1", 8 * MIB), backing=below)
    qemu_io(child, "write -P 3 3M 64k")
    given = named(group, "top-1", way)
    reach = ("--allow-backing", "/dev", "--search", f"/dev/{group.name}")
    ran = chainmerge_forked("merge", "--json", *reach, given)
    assert ran.status == 0, ran
    assert_clean(base)
    assert_clean(child)
    assert_reads(child, (1, 0, 512 * KIB), (2, 512 * KIB, MIB), (3, 3 * MIB, 64 * KIB))
    # A number is another volume's after the next boot.
    assert "/dm-" not in info(child)["backing-filename"]
    assert os.path.realpath(info(child)["full-backing-filename"]) == os.path.realpath(base)


# Volumes that are not active


def chain_of_three(group: Group) -> tuple[Path, Path, Path]:
    base = create(group.create("base", 8 * MIB), 4 * MIB)
    qemu_io(base, "write -P 1 0 1M")
    middle = create(group.create("middle", 4 * MIB), backing=base)
    qemu_io(middle, "write -P 2 512k 1M")
    top = create(group.create("top", 4 * MIB), backing=middle)
    qemu_io(top, "write -P 3 3M 64k")
    return base, middle, top


def test_inactive_volumes_are_activated_and_deactivated_again(group: Group) -> None:
    base, _, top = chain_of_three(group)
    group.deactivate("base", "top")
    ran = refused(top)
    assert "--activate" in ran.err
    ran = chainmerge_forked("merge", "--activate", "--base", base, top)
    assert ran.status == 0, ran
    assert [group.is_active(name) for name in ("base", "middle", "top")] == [False, True, False]
    group.activate("base")
    assert_clean(base)
    assert_reads(base, (1, 0, 512 * KIB), (2, 512 * KIB, MIB), (3, 3 * MIB, 64 * KIB))


def test_a_failure_deactivates_too(group: Group) -> None:
    base, middle, top = chain_of_three(group)
    group.deactivate("base", "middle", "top")
    ran = chainmerge_forked("merge", "--activate", "--base", group.path("nothing"), top)
    assert ran.status != 0, ran
    assert not any(group.is_active(name) for name in ("base", "middle", "top"))
    # And with nothing active, not even the group's directory is there.
    assert not base.parent.exists()
    assert not middle.exists()


def test_an_image_cannot_have_any_volume_activated(group: Group) -> None:
    """A guest may write any name into the header of its disk."""
    secret = group.create("secret", 4 * MIB)
    qemu_io(secret, "write -P 7 0 1M", fmt="raw")
    group.deactivate("secret")
    top = Path("/tmp/untrusted.qcow2")
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", secret, "-F", "raw", top, "4M")
    ran = chainmerge_forked("info", "--activate", top)
    assert ran.status == 3, ran
    assert not group.is_active("secret")
    top.unlink()


def test_an_inactive_volume_could_be_another_user_of_base(group: Group) -> None:
    base, middle, top = chain_of_three(group)
    sibling = create(group.create("sibling", 4 * MIB), backing=middle)
    group.create("stranger", 4 * MIB)
    group.deactivate("sibling", "stranger")
    ran = refused(top)
    said = " ".join(ran.err.split())
    assert f"2 logical volumes ({sibling}, {group.path('stranger')})" in said
    assert "volumes-inactive" in said
    plan = chainmerge_forked("plan", "--json", "--active", top, top).json
    assert [str(sibling) in each for each in plan["warnings"]] == [True]
    # Once they are looked at, one of them is a sibling, and the other one is not.
    ran = refused("--activate", top)
    assert f"also the backing file of {sibling}" in " ".join(ran.err.split())
    assert not group.is_active("sibling")
    assert not group.is_active("stranger")
    assert base.exists()


def test_a_child_on_an_inactive_volume_is_re_pointed(group: Group) -> None:
    base, middle, top = chain_of_three(group)
    child = create(group.create("child", 4 * MIB), backing=top)
    qemu_io(child, "write -P 4 2M 64k")
    group.create("stranger", 4 * MIB)
    group.deactivate("child", "stranger")
    ran = chainmerge_forked("merge", "--activate", "--json", top)
    assert ran.status == 0, ran
    assert ran.json["repointed"] == [str(child)]
    assert not group.is_active("child")
    group.activate("child")
    assert info(child)["backing-filename"] == str(middle)
    assert_reads(child, (2, 512 * KIB, MIB), (4, 2 * MIB, 64 * KIB), (3, 3 * MIB, 64 * KIB))
    assert base.exists()


# Kinds of devices


CLUSTERS = {"512 B": 512, "4 KiB": 4096, "64 KiB": 65536}


@pytest.mark.parametrize(
    ("clusters", "data", "direction"),
    [
        ("512 B", "cow", "commit"),
        ("4 KiB", "in-place", "commit"),
        ("64 KiB", "cow", "pull"),
        pytest.param("512 B", "in-place", "pull", marks=pytest.mark.soak),
        pytest.param("4 KiB", "cow", "pull", marks=pytest.mark.soak),
        pytest.param("64 KiB", "in-place", "commit", marks=pytest.mark.soak),
    ],
)
def test_sectors_of_4096_bytes(
    group_of_large_sectors: Group, clusters: str, data: str, direction: str
) -> None:
    group = group_of_large_sectors
    base = create(group.create("base", 12 * MIB), 8 * MIB, cluster_size=CLUSTERS[clusters])
    add_bitmaps(base, "both", "stale")
    qemu_io(base, "write -P 1 0 3M", "write -P 2 6M 1M")
    top = create(group.create("top", 12 * MIB), backing=base, cluster_size=CLUSTERS[clusters])
    add_bitmaps(top, "both")
    qemu_io(top, "write -P 3 1M 1M", "write -P 4 7M 3k", "write -z 2500k 1M")
    merged("--data", data, "--direction", direction, top)
    result = base if direction == "commit" else top
    assert_clean(result)
    assert_reads(
        result,
        (1, 0, MIB), (3, MIB, MIB), (1, 2 * MIB, 452 * KIB), (0, 2500 * KIB, MIB),
        (2, 6 * MIB, MIB), (4, 7 * MIB, 3 * KIB),
    )  # fmt: skip
    assert bitmap_names(result)["both"]["flags"] == ["auto"]


def test_a_raw_volume_as_base(group: Group) -> None:
    base = group.create("base", 8 * MIB)
    fill(base)
    top = create(group.create("top", 8 * MIB), backing=base, backing_format="raw")
    qemu_io(top, "write -P 2 1M 1M", "write -z 4M 1M")
    merged("--format", f"{base}=raw", top)
    content = base.read_bytes()
    assert content[MIB : 2 * MIB] == bytes([2]) * MIB
    assert content[4 * MIB : 5 * MIB] == bytes(MIB)
    assert content[5 * MIB :] == bytes([STALE]) * (3 * MIB)


def raw_and_smaller(group: Group) -> tuple[Path, Path, int]:
    """A raw base, and a larger disk above it, which does not end where an extent does."""
    base = group.create("base", 8 * MIB)
    fill(base)
    top = create(group.create("top", 8 * MIB), backing=base, backing_format="raw")
    disk = 18 * MIB + 256 * KIB
    qemu_img("resize", "-q", "-f", "qcow2", top, str(disk))
    qemu_io(top, "write -P 2 15M 1M", "write -P 3 1M 64k")
    return base, top, disk


def assert_top_reads(top: Path, disk: int) -> None:
    assert_reads(
        top,
        (STALE, 0, MIB), (3, MIB, 64 * KIB), (STALE, 2 * MIB, 6 * MIB),
        (0, 8 * MIB, 7 * MIB), (2, 15 * MIB, MIB), (0, 16 * MIB, disk - 16 * MIB),
    )  # fmt: skip


def assert_raw_merged(base: Path, disk: int) -> None:
    content = base.read_bytes()
    assert content[8 * MIB : 15 * MIB] == bytes(7 * MIB)
    assert content[15 * MIB : 16 * MIB] == bytes([2]) * MIB
    assert not any(content[16 * MIB :])
    assert len(content) >= disk


def test_a_raw_volume_is_extended_over_what_others_left(group: Group) -> None:
    base, top, disk = raw_and_smaller(group)
    merged("--format", f"{base}=raw", top)
    assert_top_reads(top, disk)
    assert_raw_merged(base, disk)


def test_killed_as_a_raw_volume_is_extended(
    group: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest reads what it did; the next run finishes it."""
    base, top, disk = raw_and_smaller(group)
    lvm = shutil.which("lvm")
    fatal = tmp_path / "lvm"
    fatal.write_text(
        f'#!/bin/sh\n{lvm} "$@" || exit\n[ "$1" != lvextend ] || kill -KILL $PPID\n',
        encoding="utf-8",
    )
    fatal.chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        ran = chainmerge_forked("merge", "--format", f"{base}=raw", top)
    assert ran.status == -signal.SIGKILL
    assert group.size_of("base") >= disk
    assert_top_reads(top, disk)
    merged("--format", f"{base}=raw", top)
    assert_top_reads(top, disk)
    assert_raw_merged(base, disk)


def test_a_striped_volume_grows_by_whole_stripes(group: Group) -> None:
    base = create(group.create("base", 4 * MIB, "-i", "2"), 32 * MIB)
    top = create(group.create("top", 16 * MIB), backing=base)
    qemu_io(top, "write -P 5 0 9M")
    merged(top)
    assert_clean(base)
    assert_reads(base, (5, 0, 9 * MIB))
    assert group.size_of("base") == 10 * MIB


# Giving back


def test_what_is_freed_is_discarded_and_the_volume_reduced(group: Group) -> None:
    base = create(group.create("base", 32 * MIB), 64 * MIB)
    qemu_io(base, "write -P 1 0 4M")
    top = create(group.create("top", 8 * MIB), backing=base)
    qemu_io(top, "write -P 2 0 1M")
    report = merged("--discard", "--data", "in-place", top).json
    end = report["image_end"]
    assert end < 8 * MIB
    assert not base.read_bytes()[end:].strip(b"\0")
    assert_reads(base, (2, 0, MIB), (1, MIB, 3 * MIB))
    create(top, backing=base)
    qemu_io(top, "write -P 3 0 64k")
    merged("--shrink", "--leave", "0", top)
    assert group.size_of("base") <= 8 * MIB
    assert_clean(base)
    assert_reads(base, (3, 0, 64 * KIB), (2, 64 * KIB, MIB - 64 * KIB))


# Thin pools


def test_thin_volumes(group: Group) -> None:
    group.create_pool("pool", 64 * MIB)
    base = create(group.create_thin("pool", "base", 256 * MIB), 64 * MIB)
    qemu_io(base, "write -P 1 0 8M")
    top = create(group.create_thin("pool", "top", 256 * MIB), backing=base)
    qemu_io(top, "write -P 2 4M 8M")
    merged("--discard", top)
    assert_clean(base)
    assert_reads(base, (1, 0, 4 * MIB), (2, 4 * MIB, 8 * MIB))


def small_pool(group: Group) -> tuple[Path, Path]:
    """A pool of 16 MiB with base in it, and 24 MiB above that."""
    group.create_pool("pool", 16 * MIB)
    base = create(group.create_thin("pool", "base", 64 * MIB), 64 * MIB)
    add_bitmaps(base, "both")
    qemu_io(base, "write -P 1 0 1M")
    top = create(group.create("top", 32 * MIB), backing=base)
    add_bitmaps(top, "both")
    qemu_io(top, "write -P 2 0 24M")
    return base, top


def test_a_pool_that_is_too_small_is_refused_beforehand(group: Group) -> None:
    base, top = small_pool(group)
    before = base.read_bytes()
    plan = chainmerge_forked("plan", "--json", top).json
    ran = refused(top)
    said = " ".join(ran.err.split())
    assert f"{plan['space']['missing']} bytes more are needed" in said
    assert "--extend-pool" in said
    assert 8 * MIB < plan["space"]["missing"] < 12 * MIB
    assert base.read_bytes() == before
    # What it may take is no less than what it takes.
    used = group.used_of_pool("pool") * 16 * MIB / 100
    run("lvextend", "-q", "-L", f"{64 * MIB}b", f"{group.name}/pool")
    merged(top)
    taken = group.used_of_pool("pool") * 64 * MIB / 100 - used
    assert taken <= plan["space"]["allocates"] < taken + 2 * MIB
    assert_clean(base)
    assert_reads(base, (2, 0, 24 * MIB))


def test_a_pool_is_extended(group: Group) -> None:
    base, top = small_pool(group)
    plan = chainmerge_forked("plan", "--json", "--extend-pool", top).json
    assert not plan["refusals"]
    merged("--extend-pool", top)
    assert group.size_of("pool") == 16 * MIB + plan["space"]["pool"]["extend_by"] < 32 * MIB
    assert_clean(base)
    assert_reads(base, (2, 0, 24 * MIB))
    assert bitmap_names(base)["both"]["flags"] == ["auto"]


def test_chunks_that_a_snapshot_shares_are_counted(group: Group) -> None:
    """Writing over them takes new ones, as if there were none."""
    group.create_pool("pool", 24 * MIB)
    base = create(group.create_thin("pool", "base", 64 * MIB), 32 * MIB)
    qemu_io(base, "write -P 1 0 16M")
    run("lvcreate", "-q", "-y", "-s", "-n", "shared", f"{group.name}/base")
    top = create(group.create("top", 32 * MIB), backing=base)
    qemu_io(top, "write -P 2 0 12M")
    before = base.read_bytes()
    # A snapshot is not active, and could be anything.
    in_place = ("--data", "in-place", "--active", top, top)
    ran = refused(*in_place)
    assert "more are needed" in " ".join(ran.err.split())
    assert base.read_bytes() == before
    merged("--extend-pool", *in_place)
    assert_clean(base)
    assert_reads(base, (2, 0, 12 * MIB), (1, 12 * MIB, 4 * MIB))


# Other types


def on_type(group: Group, kind: str) -> Path:
    """A volume of 4 MiB."""
    match kind:
        case "cache" | "writecache":
            path = group.create("base", 4 * MIB)
            group.create("fast", 8 * MIB)
            group.deactivate("fast")
            convert = ("--type", kind, "--cachevol", "fast", f"{group.name}/base")
            run("lvconvert", "-q", "-y", *convert)
            return path
        case "raid5":
            # On two disks; what that is worth does not matter here.
            return group.create("base", 4 * MIB, "--type", kind, "-i", "2", "--alloc", "anywhere")
        case _:
            return group.create("base", 4 * MIB, "--type", kind, "-m", "1")


@pytest.mark.parametrize("kind", ["raid1", "raid5", "mirror", "cache"])
def test_volumes_of_other_types_are_extended(group: Group, kind: str) -> None:
    base = create(on_type(group, kind), 32 * MIB)
    top = create(group.create("top", 16 * MIB), backing=base)
    qemu_io(top, "write -P 5 0 9M")
    plan = chainmerge_forked("plan", "--json", top).json
    merged("--delete", top)
    assert_clean(base)
    assert_reads(base, (5, 0, 9 * MIB))
    assert group.size_of("base") == plan["space"]["grow_to"]
    assert set(group.uuids()) == {"base"}


def test_what_lvm_does_not_extend_is_refused_beforehand(group: Group) -> None:
    base = create(on_type(group, "writecache"), 32 * MIB)
    top = create(group.create("top", 16 * MIB), backing=base)
    qemu_io(top, "write -P 5 0 9M")
    before = base.read_bytes()
    ran = refused(top)
    assert "of the type writecache" in " ".join(ran.err.split())
    assert base.read_bytes() == before
