# SPDX-License-Identifier: Apache-2.0
"""Volumes removed and renamed at the end of a merge, by LVM itself; killed at every step."""

from __future__ import annotations

import json
import os
import shutil
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.support.qemu import (
    assert_clean,
    bitmap_names,
    content,
    create,
    info,
    qemu_img,
    qemu_io,
    run,
)
from tests.vm.commands import chainmerge_forked
from tests.vm.guest.volumes import MIB, Group

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tests.support.cli import Ran

DISK = 4 * MIB
STEPS = [
    (command, moment) for command in ("lvremove", "lvrename") for moment in ("before", "after")
]


def chain(
    group: Group, *names: str, root_size: int = 8 * MIB, options: Sequence[str] = ()
) -> list[Path]:
    """Images one above the other, each with a piece of its own, by relative names."""
    sizes = [root_size, *(8 * MIB for _ in names[1:])]
    paths = [group.create(name, size, *options) for name, size in zip(names, sizes, strict=True)]
    for number, path in enumerate(paths):
        create(path, DISK, backing=names[number - 1] if number else None)
        qemu_img("bitmap", "--add", "-f", "qcow2", path, "kept")
        qemu_io(path, f"write -q -P {number + 1} {number * 256}k 512k")
    return paths


@contextmanager
def deadly(command: str, moment: str, place: Path) -> Iterator[None]:
    """Whoever has lvm run *command* is killed, before or after that."""
    lvm = shutil.which("lvm")
    before = f'[ "$1" != {command} ] || kill -KILL $PPID' if moment == "before" else ":"
    after = f'[ "$1" != {command} ] || kill -KILL $PPID' if moment == "after" else ":"
    fatal = place / "lvm"
    fatal.write_text(f'#!/bin/sh\n{before}\n{lvm} "$@" || exit\n{after}\n', encoding="utf-8")
    fatal.chmod(0o755)
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{place}:{path}"
    try:
        yield
    finally:
        os.environ["PATH"] = path
        fatal.unlink()


def done(*arguments: str | Path) -> Ran:
    ran = chainmerge_forked(*arguments)
    assert ran.status == 0, ran
    return ran


def unfinished() -> list[dict[str, object]]:
    merges: list[dict[str, object]] = chainmerge_forked("status", "--json").json["merges"]
    return merges


@pytest.mark.parametrize("moment", ["before", "after", None])
def test_merged_volumes_are_removed(group: Group, tmp_path: Path, moment: str | None) -> None:
    base, _, top = chain(group, "base-0", "middle-1", "top-2")
    expected, uuids = content(top), group.uuids()
    merge = ("merge", "--json", "--delete", "--base", base, top)
    if moment is not None:
        with deadly("lvremove", moment, tmp_path):
            assert chainmerge_forked(*merge).status == -signal.SIGKILL
        assert unfinished()
    done(*merge)
    assert group.uuids() == {"base-0": uuids["base-0"]}
    assert content(base) == expected
    assert_clean(base)
    assert not unfinished()
    assert done(*merge).json["outcome"] == "already-merged"


def test_a_volume_made_anew_stays(group: Group, tmp_path: Path) -> None:
    base, middle, top = chain(group, "base-0", "middle-1", "top-2")
    with deadly("lvremove", "after", tmp_path):
        ran = chainmerge_forked("merge", "--delete", "--base", base, top)
    assert ran.status == -signal.SIGKILL
    run("lvremove", "-q", "-y", f"{group.name}/middle-1")
    group.create("middle-1", 4 * MIB)
    qemu_io(middle, "write -q -P 77 0 64k", fmt="raw")
    new = group.uuids()["middle-1"]
    done("merge", "--delete", "--base", base, top)
    assert group.uuids()["middle-1"] == new
    assert middle.read_bytes()[:65536] == bytes([77]) * 65536


def test_an_open_volume_is_not_removed(group: Group) -> None:
    base, top = chain(group, "base-0", "top-1")
    expected = content(top)
    with top.open("rb"):
        ran = chainmerge_forked("merge", "--delete", top)
    assert ran.status == 1, ran
    assert "in use" in ran.err
    assert content(base) == content(top) == expected
    done("merge", "--delete", top)
    assert set(group.uuids()) == {"base-0"}
    assert content(base) == expected


def test_a_volume_with_lvm_snapshots_is_refused(group: Group) -> None:
    base, top = chain(group, "base-0", "top-1")
    before = content(base)
    run("lvcreate", "-q", "-y", "-s", "-L", f"{4 * MIB}b", "-n", "snap", f"{group.name}/top-1")
    assert chainmerge_forked("merge", "--delete", top).status == 3
    # The snapshot shows the same overlay, which is another reason.
    plan = chainmerge_forked("plan", "--json", "--delete", top).json
    assert "cannot-take-away" in [one["code"] for one in plan["refusals"]]
    assert set(group.uuids()) == {"base-0", "top-1", "snap"}
    assert content(base) == before


def test_inactive_volumes_are_removed_too(group: Group) -> None:
    base, top = chain(group, "base-0", "top-1")
    expected, uuids = content(top), group.uuids()
    group.deactivate("base-0", "top-1")
    done("merge", "--activate", "--keep-name", "--direction", "commit", top)
    assert group.uuids() == {"top-1": uuids["base-0"]}
    assert not group.is_active("top-1")
    group.activate("top-1")
    assert content(top) == expected
    assert not base.exists()


@pytest.mark.parametrize(("command", "moment"), STEPS)
def test_killed_on_the_way_to_the_name(
    group: Group, tmp_path: Path, command: str, moment: str
) -> None:
    _, base, middle, top, child = chain(group, "root-0", "base-1", "middle-2", "top-3", "child-4")
    expected, above, uuids = content(top), content(child), group.uuids()
    merge = (
        "merge",
        "--json",
        "--keep-name",
        "--delete",
        "--direction",
        "commit",
        "--base",
        base,
        top,
    )
    with deadly(command, moment, tmp_path):
        assert chainmerge_forked(*merge).status == -signal.SIGKILL
    done(*merge)
    assert group.uuids() == {
        "root-0": uuids["root-0"], "top-3": uuids["base-1"], "child-4": uuids["child-4"],
    }  # fmt: skip
    assert info(top)["backing-filename"] == "root-0"
    assert info(child)["backing-filename"] == "top-3"
    assert content(top) == expected
    assert content(child) == above
    assert_clean(top)
    assert bitmap_names(top)["kept"]["flags"] == ["auto"]
    assert not unfinished()
    assert not middle.exists()
    assert done(*merge).json["outcome"] == "already-merged"


def test_names_of_ovirt(group: Group, tmp_path: Path) -> None:
    """UUIDs, and links in the image's directory, from which backing names count."""
    names = [f"{digit * 8}-aaaa-bbbb-cccc-{digit * 12}" for digit in "1234"]
    paths = chain(group, *names)
    image = tmp_path / "images"
    image.mkdir()
    links = [image / name for name in names]
    for link, path in zip(links, paths, strict=True):
        link.symlink_to(path)
    above, uuids = content(links[3]), group.uuids()
    done("merge", "--keep-name", "--direction", "commit", "--base", links[1], links[2])
    assert sorted(one.name for one in image.iterdir()) == [names[0], names[2], names[3]]
    assert group.uuids()[names[2]] == uuids[names[1]]
    assert info(links[2])["backing-filename"] == names[0]
    assert info(links[3])["backing-filename"] == names[2]
    assert content(links[3]) == above


# As Proxmox VE 9 makes snapshots of volumes: the current image keeps its name, what is below it
# gets that of the snapshot. Volumes have the size that qemu-img measures, and no byte more.

PVE_DISK = 24 * MIB
CURRENT = "vm-100-disk-0.qcow2"


def measured(size: int, *options: str) -> int:
    out = qemu_img("measure", "--output=json", "--size", str(size), "-O", "qcow2", *options)
    needed = int(json.loads(out)["fully-allocated"])
    return -(-needed // MIB) * MIB


def of_snapshot(name: str) -> str:
    return f"snap_vm-100-disk-0_{name}.qcow2"


def proxmox_chain(group: Group, snapshots: Sequence[str]) -> Path:
    disk = group.create(CURRENT, measured(PVE_DISK))
    qemu_img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", disk, str(PVE_DISK))
    qemu_io(disk, "write -q -P 1 0 20M")
    overlay = "extended_l2=on,cluster_size=128k"
    for number, name in enumerate(snapshots):
        run("lvrename", "-q", group.name, CURRENT, of_snapshot(name))
        group.create(CURRENT, measured(PVE_DISK, "-o", overlay))
        qemu_img(
            "create", "-q", "-f", "qcow2", "-b", of_snapshot(name), "-F", "qcow2",
            "-o", f"{overlay},preallocation=metadata", disk,
        )  # fmt: skip
        qemu_io(
            disk,
            f"write -q -P {number + 10} {number * 3}M 5M",
            f"write -q -P {number + 20} {(number + 7) * 1041 + 3}k 20k",
            f"write -q -z {20 + number}M 1M",
        )
    return disk


@pytest.mark.parametrize("snapshot", ["first", "middle", "last"])
def test_proxmox_deletes_a_snapshot(group: Group, snapshot: str) -> None:
    names = ["first", "middle", "last"]
    disk = proxmox_chain(group, names)
    expected, uuids, sizes = content(disk), group.uuids(), group.sizes()
    above = {
        "first": group.path(of_snapshot("middle")),
        "middle": group.path(of_snapshot("last")),
        "last": disk,
    }[snapshot]
    seen = content(above)
    done("merge", "--keep-name", "--delete", above)
    gone = of_snapshot(snapshot)
    assert set(group.uuids()) == set(uuids) - {gone}
    # None is larger than it was, under whatever name.
    assert group.sizes() == {uuid: sizes[uuid] for uuid in group.uuids().values()}
    assert content(above) == seen
    assert content(disk) == expected
    assert_clean(above)
    backing = info(disk).get("backing-filename")
    assert backing == of_snapshot("middle" if snapshot == "last" else "last")


def test_proxmox_flattens(group: Group) -> None:
    disk = proxmox_chain(group, ["first", "middle", "last"])
    expected, uuids, sizes = content(disk), group.uuids(), group.sizes()
    done("flatten", "--delete", disk)
    assert group.uuids() == {CURRENT: uuids[CURRENT]}
    assert group.sizes() == {uuids[CURRENT]: sizes[uuids[CURRENT]]}
    assert "backing-filename" not in info(disk)
    assert content(disk) == expected
    assert_clean(disk)
