# SPDX-License-Identifier: Apache-2.0
"""Snapshots on logical volumes thinned out, and what volume groups get back, by LVM itself."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from tests.support.qemu import assert_clean, bitmap_names, content, info, run
from tests.vm.commands import chainmerge_forked
from tests.vm.guest.test_removals import (
    CURRENT,
    STEPS,
    chain,
    deadly,
    done,
    of_snapshot,
    proxmox_chain,
    unfinished,
)
from tests.vm.guest.volumes import MIB, Group

if TYPE_CHECKING:
    from pathlib import Path

TYPES = {
    "linear": (),
    "striped": ("--type", "striped", "-i", "2"),
    "raid1": ("--type", "raid1", "-m", "1"),
}


def assert_freed(group: Group, before: int, freed: object, what: str) -> None:
    after = group.free()
    print(f"{what}: freed_bytes {freed}, vg_free {before} -> {after}")
    assert after - before == freed


@pytest.mark.parametrize("direction", ["commit", "pull"])
def test_snapshots_of_proxmox_are_thinned_out(group: Group, direction: str) -> None:
    names = [of_snapshot(name) for name in ("first", "second", "third", "fourth")]
    disk = proxmox_chain(group, ["first", "second", "third", "fourth"])
    third = group.path(names[2])
    shown, kept, uuids, before = content(disk), content(third), group.uuids(), group.free()
    rules = ("thin-out", "--json", "--direction", direction, "--keep", "*_third.qcow2")
    plan = done(*rules, "--dry-run", disk).json
    assert [one["rule"] for one in plan["snapshots"]] == ["no-rule", "no-rule", "keep", "no-rule"]
    report = done(*rules, disk).json
    assert [one["outcome"] for one in report["ranges"]] == ["merged", "merged"]
    of_third, of_disk = (names[2], CURRENT) if direction == "pull" else (names[0], names[3])
    assert group.uuids() == {names[2]: uuids[of_third], CURRENT: uuids[of_disk]}
    assert (content(disk), content(third)) == (shown, kept)
    assert info(disk)["backing-filename"] == names[2]
    assert_clean(disk)
    assert_clean(third)
    assert not unfinished()
    assert_freed(group, before, plan["freed_bytes"], f"thin-out, {direction}")


@pytest.mark.parametrize(("command", "moment"), STEPS)
def test_killed_while_thinning_out(group: Group, tmp_path: Path, command: str, moment: str) -> None:
    """In the range of the leaf, whose own volume goes, and then in the one below."""
    a, _, c, d, leaf = chain(group, "snap-a", "snap-b", "snap-c", "snap-d", "disk-0")
    shown, kept, uuids, before = content(leaf), content(c), group.uuids(), group.free()
    thin_out = ("thin-out", "--json", "--direction", "commit", "--keep", "snap-c", leaf)
    for _ in range(2):
        with deadly(command, moment, tmp_path):
            assert chainmerge_forked(*thin_out).status == -signal.SIGKILL
        (merge,) = unfinished()
        assert "thin-out" in str(merge["command"])
    done(*thin_out)
    assert group.uuids() == {"snap-c": uuids[a.name], "disk-0": uuids[d.name]}
    assert (content(leaf), content(c)) == (shown, kept)
    assert info(leaf)["backing-filename"] == "snap-c"
    assert bitmap_names(leaf)["kept"]["flags"] == ["auto"]
    assert not unfinished()
    assert_freed(group, before, 24 * MIB, f"thin-out killed {moment} {command}")


def test_age_and_what_stays(group: Group) -> None:
    lowest, *_, leaf = chain(group, "snap-a", "snap-b", "snap-c", "disk-0")

    def rules(*arguments: str) -> list[str]:
        plan = done("thin-out", "--json", "-n", *arguments, leaf).json
        return [one["rule"] for one in plan["snapshots"]]

    assert rules("--keep-within", "1h") == ["keep-within"] * 3
    of_lvm = ("-s", "-L", f"{4 * MIB}b", "-n", "of-a", f"{group.name}/{lowest.name}")
    run("lvcreate", "-q", "-y", *of_lvm)
    assert rules("--keep-last", "0") == ["not-removable", "no-rule", "no-rule"]


@pytest.mark.parametrize("direction", ["commit", "pull"])
@pytest.mark.parametrize("kind", list(TYPES))
def test_freed_bytes_are_what_the_group_gets_back(group: Group, direction: str, kind: str) -> None:
    """Extents of removed volumes, with those of copies, less what the result is extended by."""
    base, _, top = chain(group, "base-0", "middle-1", "top-2", root_size=MIB, options=TYPES[kind])
    before = group.free()
    merge = ("--json", "--direction", direction, "--delete", "--base", base, top)
    plan = done("plan", *merge).json
    (scanned,) = done("scan", "--json", "--no-history", group.name).json["chains"]
    automatic = done("plan", "--json", "--delete", "--base", base, top).json
    assert scanned["freed_bytes"] == automatic["freed_bytes"]
    done("merge", *merge)
    grown = plan["space"]["grow_to"]
    assert kind != "linear" or (grown is not None) == (direction == "commit")
    assert_freed(group, before, plan["freed_bytes"], f"{kind}, {direction}, grown to {grown}")


def test_a_cached_volume(group: Group) -> None:
    base, top = chain(group, "base-0", "top-1")
    run("lvcreate", "-q", "-y", "--type", "cache-pool", "-L", "8m", "-n", "other", group.name)
    run("lvcreate", "-q", "-y", "--type", "cache-pool", "-L", "8m", "-n", "fast", group.name)
    pool = f"{group.name}/fast"
    run("lvconvert", "-q", "-y", "--type", "cache", "--cachepool", pool, f"{group.name}/top-1")
    before = group.free()
    plan = done("plan", "--json", "--direction", "commit", "--delete", top).json
    done("merge", "--json", "--direction", "commit", "--delete", top)
    assert_freed(group, before, plan["freed_bytes"], "cached")
    assert_clean(base)


def test_what_a_volume_is_reduced_by(group: Group) -> None:
    _, top = chain(group, "base-0", "top-1")
    before = group.free()
    options = ("--json", "--direction", "commit", "--delete", "--shrink", "--leave", "0", top)
    plan = done("plan", *options).json
    done("merge", *options)
    assert_freed(group, before, plan["freed_bytes"], "reduced")
