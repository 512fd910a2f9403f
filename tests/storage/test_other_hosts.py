# SPDX-License-Identifier: Apache-2.0
"""Volumes that other hosts may use are not written to, unless this one holds them for itself."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import chainmerge
from chainmerge.merging.errors import MergeUnfinished
from chainmerge.options import Access, OptionUnusable
from chainmerge.storage import lvm
from chainmerge.storage.other_hosts import held_by_this_host
from chainmerge.storage.volume_errors import (
    LvmFailed,
    LvmMissing,
    LvmUnfinished,
    NotALogicalVolume,
    VolumeNotGivenBack,
    VolumeNotGranted,
    VolumeShared,
)
from tests.support.fake_lvm import FakeLvm
from tests.support.loopdev import loop_device
from tests.support.qemu import assert_clean, content, create, qemu_io

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20
EXTENT = 4 * MIB
DEVICES = Access(allow_backing=("/dev",))


@dataclass(frozen=True)
class Volumes:
    """A chain on two logical volumes, one above the other."""

    base: Path
    top: Path
    fake: FakeLvm

    def digest(self) -> str:
        """Of every byte of both."""
        return hashlib.sha256(self.base.read_bytes() + self.top.read_bytes()).hexdigest()


@pytest.fixture
def volumes(
    tmp_path: Path, fake_lvm: FakeLvm, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Volumes]:
    physical = tmp_path / "physical-volume"
    physical.touch()
    with contextlib.ExitStack() as stack:
        base, top = (
            stack.enter_context(loop_device(tmp_path / name, 4 * EXTENT))
            for name in ("base-volume", "top-volume")
        )
        fake_lvm.add_group("vg", extents=40, devices=[physical], extent_size=EXTENT)
        fake_lvm.add_volume("vg", "base", base)
        fake_lvm.add_volume("vg", "top", top)
        fake_lvm.show_in_sysfs(monkeypatch)
        create(base, 8 * MIB)
        create(top, backing=base)
        qemu_io(top, "write -q -P 7 0 2M")
        yield Volumes(base, top, fake_lvm)


class Site:
    """A command that locks volumes; what it is asked is written down."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "asked"
        self.program = directory / "lock-volumes"
        self.answer(0)

    def answer(self, status: int, *, unlock: int = 0) -> None:
        script = f"""#!/bin/sh
            echo "$@" >> {shlex.quote(str(self.log))}
            echo 'said by the site' >&2
            [ "$2" = unlock ] && exit {unlock}
            exit {status}
        """
        self.program.write_text(script, encoding="utf-8")
        self.program.chmod(0o755)

    @property
    def access(self) -> Access:
        command = f"{shlex.quote(str(self.program))} --quiet"
        return Access(allow_backing=("/dev",), lock_command=command)

    @property
    def asked(self) -> list[str]:
        if not self.log.exists():
            return []
        return self.log.read_text(encoding="utf-8").splitlines()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


SHARED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    # The group, the host's lvm, how base is active.
    "sanlock, shared": ({"lock_type": "sanlock"}, {}, "shared"),
    "dlm, shared": ({"lock_type": "dlm"}, {}, "shared"),
    "sanlock, in numbers": ({"lock_type": "sanlock"}, {"numeric": True}, "shared"),
    "sanlock, by Debian 12": ({"lock_type": "sanlock"}, {"version": "2.03.16"}, "shared"),
    "sanlock, not told": ({"lock_type": "sanlock"}, {"version": "2.03.17"}, "exclusive"),
    "sanlock, by an old lvm": ({"lock_type": "sanlock"}, {"version": "2.02.168"}, "shared"),
    "sanlock, of an odd version": ({"lock_type": "sanlock"}, {"version": "9"}, "exclusive"),
    "clustered, shared": ({"clustered": True}, {"version": "2.02.187"}, "shared"),
    "clustered, in numbers": (
        {"clustered": True},
        {"version": "2.02.168", "numeric": True},
        "shared",
    ),
    "clustered, not told": ({"clustered": True}, {}, "exclusive"),
    "of another host": ({"system_id": "other"}, {"system_id": "here"}, "exclusive"),
    "of a host, and this has no ID": ({"system_id": "other"}, {}, "exclusive"),
}
OWN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "local": ({}, {}, "exclusive"),
    "local, in numbers": ({}, {"numeric": True}, "exclusive"),
    "local, by an old lvm": ({}, {"version": "2.02.168"}, "exclusive"),
    "local, with a lock type of none": ({"lock_type": "none"}, {}, "exclusive"),
    "sanlock, exclusive": ({"lock_type": "sanlock"}, {}, "exclusive"),
    "sanlock, exclusive, in numbers": ({"lock_type": "sanlock"}, {"numeric": True}, "exclusive"),
    "sanlock, first told": ({"lock_type": "sanlock"}, {"version": "2.03.18"}, "exclusive"),
    "dlm, exclusive": ({"lock_type": "dlm"}, {}, "exclusive"),
    "clustered, exclusive": ({"clustered": True}, {"version": "2.02.187"}, "exclusive"),
    "of this host": ({"system_id": "here"}, {"system_id": "here"}, "exclusive"),
}


def arrange(volumes: Volumes, scene: tuple[dict[str, Any], dict[str, Any], str]) -> None:
    group, host, active = scene
    volumes.fake.share_group("vg", **group)
    volumes.fake.behave(**host)
    for name in ("base", "top"):
        volumes.fake.activate_as(name, active)


@pytest.mark.parametrize("scene", SHARED.values(), ids=SHARED)
def test_what_another_host_may_use_is_refused(
    volumes: Volumes, scene: tuple[dict[str, Any], dict[str, Any], str]
) -> None:
    arrange(volumes, scene)
    before = volumes.digest()
    refusals = [one.code for one in chainmerge.plan(volumes.top, access=DEVICES).refusals]
    assert refusals == ["volume-shared"]
    with pytest.raises(VolumeShared) as caught:
        chainmerge.merge(volumes.top, access=DEVICES)
    assert caught.value.exit_code == 3
    assert caught.value.group == "vg"
    assert volumes.digest() == before


@pytest.mark.parametrize("scene", OWN.values(), ids=OWN)
def test_what_is_this_hosts_alone_is_merged(
    volumes: Volumes, scene: tuple[dict[str, Any], dict[str, Any], str]
) -> None:
    arrange(volumes, scene)
    expected = content(volumes.top)
    assert not chainmerge.plan(volumes.top, access=DEVICES).refusals
    chainmerge.merge(volumes.top, access=DEVICES)
    assert_clean(volumes.base)
    assert content(volumes.base) == expected


def test_the_message_says_how_to_hold_it(volumes: Volumes) -> None:
    arrange(volumes, SHARED["sanlock, shared"])
    with pytest.raises(VolumeShared) as caught:
        chainmerge.merge(volumes.top, access=DEVICES)
    assert "lock type sanlock" in caught.value.sentence
    assert "'lvchange -aey vg/base'" in caught.value.advice
    arrange(volumes, SHARED["sanlock, not told"])
    with pytest.raises(VolumeShared) as caught:
        chainmerge.merge(volumes.top, access=DEVICES)
    assert "this lvm cannot tell" in caught.value.sentence
    assert "update lvm2" in caught.value.advice
    arrange(volumes, SHARED["of another host"])
    with pytest.raises(VolumeShared) as caught:
        chainmerge.merge(volumes.top, access=DEVICES)
    assert "system ID is 'other', this one's is 'here'" in caught.value.sentence
    assert "run the command on the host 'other'" in caught.value.advice


WRITERS: dict[str, Callable[[Volumes, Access], object]] = {
    "pull": lambda it, access: chainmerge.merge(
        it.top, access=access, options=chainmerge.MergeOptions(direction="pull")
    ),
    "flatten": lambda it, access: chainmerge.flatten(it.top, access=access),
    "bitmaps add": lambda it, access: chainmerge.bitmaps_add(it.base, "new", access=access),
    "prune": lambda it, access: chainmerge.prune(it.top, access=access),
    "prune a chain": lambda it, access: chainmerge.prune(
        it.top, access=Access(
            allow_backing=("/dev",), active=str(it.top), lock_command=access.lock_command
        )
    ),
    "bitmaps repair": lambda it, access: chainmerge.bitmaps_repair(it.top, access=access),
    "repair": lambda it, access: chainmerge.repair(it.base, access=access),
    "relink": lambda it, access: chainmerge.relink(it.top, it.base, access=access),
}  # fmt: skip


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_nothing_writes_to_it(
    volumes: Volumes, write: Callable[[Volumes, Access], object], site: Site
) -> None:
    arrange(volumes, SHARED["sanlock, shared"])
    before = volumes.digest()
    with pytest.raises(VolumeShared):
        write(volumes, DEVICES)
    site.answer(1)
    with pytest.raises(VolumeNotGranted):
        write(volumes, site.access)
    assert volumes.digest() == before
    site.answer(0)
    write(volumes, site.access)
    assert [line.split()[1] for line in site.asked] == ["lock", "lock", "unlock"]


def test_what_is_only_read_may_be_shared(volumes: Volumes) -> None:
    volumes.fake.share_group("vg", lock_type="sanlock")
    volumes.fake.activate_as("base", "shared")
    chainmerge.merge(volumes.top, access=DEVICES, options=chainmerge.MergeOptions(direction="pull"))
    assert_clean(volumes.top)


def test_an_lvm_that_does_not_answer_is_no_permission(volumes: Volumes) -> None:
    volumes.fake.break_command("lvs", 5, "no answer")
    with pytest.raises(NotALogicalVolume, match="no answer"):
        chainmerge.bitmaps_add(volumes.base, "new", access=DEVICES)
    volumes.fake.mend("lvs")
    volumes.fake.share_group("vg", system_id="other")
    volumes.fake.break_command("systemid", 5, "no answer")
    with pytest.raises(NotALogicalVolume, match="no answer"):
        chainmerge.bitmaps_add(volumes.base, "new", access=DEVICES)


def test_without_lvm_nobody_knows(volumes: Volumes, monkeypatch: pytest.MonkeyPatch) -> None:
    places = os.environ["PATH"].split(os.pathsep)
    monkeypatch.setenv("PATH", os.pathsep.join(places[1:]))
    with pytest.raises(LvmMissing):
        chainmerge.bitmaps_add(volumes.base, "new", access=DEVICES)


def test_activation_takes_the_exclusive_lock(volumes: Volumes) -> None:
    volumes.fake.share_group("vg", lock_type="sanlock")
    volumes.fake.activate_as("base", "")
    device = str(volumes.base)
    lvm.activate(device, device)
    chainmerge.bitmaps_add(volumes.base, "new", access=DEVICES)
    lvm.deactivate(device, device)
    volumes.fake.activate_as("base", "elsewhere")
    with pytest.raises(LvmFailed, match="locked by other host"):
        lvm.activate(device, device)


def test_the_sites_command_gets_the_volumes_that_are_written_to(
    volumes: Volumes, site: Site
) -> None:
    arrange(volumes, SHARED["of another host"])
    expected = content(volumes.top)
    assert not chainmerge.plan(volumes.top, access=site.access).refusals
    assert site.asked == []
    chainmerge.merge(volumes.top, access=site.access)
    lock, unlock = site.asked
    assert lock == "--quiet lock /dev/mapper/vg-base"
    assert unlock == "--quiet unlock /dev/mapper/vg-base"
    assert content(volumes.base) == expected


def test_a_refusal_of_the_sites_command_is_final(volumes: Volumes, site: Site) -> None:
    before = volumes.digest()
    site.answer(7)
    with pytest.raises(VolumeNotGranted, match="status 7: said by the site") as caught:
        chainmerge.merge(volumes.top, access=site.access)
    assert caught.value.exit_code == 3
    # What was not locked is somebody else's: it is not unlocked either.
    assert [line.split()[1] for line in site.asked] == ["lock"]
    assert volumes.digest() == before


def test_a_command_that_does_not_exist_locks_nothing(volumes: Volumes) -> None:
    access = Access(allow_backing=("/dev",), lock_command="/nowhere/lock-volumes")
    with pytest.raises(VolumeNotGranted, match="cannot be run"):
        chainmerge.bitmaps_add(volumes.base, "new", access=access)


def test_it_unlocks_after_a_failure_too(volumes: Volumes, site: Site) -> None:
    def fail(_event: object) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        chainmerge.merge(volumes.top, access=site.access, on_progress=fail)
    assert [line.split()[1] for line in site.asked] in ([], ["lock", "unlock"])
    chainmerge.bitmaps_add(volumes.base, "new", access=site.access)
    with pytest.raises(chainmerge.ChainmergeError, match="new"):
        chainmerge.bitmaps_add(volumes.base, "new", access=site.access)
    assert [line.split()[1] for line in site.asked][-4:] == ["lock", "unlock"] * 2


def test_a_lock_that_stays_is_told(volumes: Volumes, site: Site) -> None:
    site.answer(0, unlock=9)
    with pytest.raises(VolumeNotGivenBack, match="status 9"):
        chainmerge.bitmaps_add(volumes.base, "new", access=site.access)
    assert [one.name for one in chainmerge.bitmaps_list(volumes.base).verdicts] == ["new"]


def test_files_are_not_locked(tmp_path: Path, site: Site) -> None:
    image = create(tmp_path / "image.qcow2", MIB)
    chainmerge.bitmaps_add(image, "new", access=site.access)
    assert site.asked == []


def killed(merge: Callable[[Callable[[chainmerge.ProgressEvent], None]], object]) -> None:
    """Have a merge killed while it copies."""

    def die(event: chainmerge.ProgressEvent) -> None:
        if event.stage == "copy":
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            merge(die)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)


def test_a_killed_merge_keeps_the_lock_and_its_rerun_gives_it_back(
    volumes: Volumes, site: Site
) -> None:
    expected = content(volumes.top)

    killed(lambda die: chainmerge.merge(volumes.top, access=site.access, on_progress=die))
    assert [line.split()[1] for line in site.asked] == ["lock"]
    (unfinished,) = chainmerge.status([volumes.base]).merges
    assert unfinished.command is not None
    words = shlex.split(unfinished.command)
    command = words[words.index("--lock-command") + 1]
    assert command == site.access.lock_command
    chainmerge.merge(volumes.top, access=Access(allow_backing=("/dev",), lock_command=command))
    assert [line.split()[1] for line in site.asked] == ["lock", "lock", "unlock"]
    assert content(volumes.base) == expected


def test_an_unfinished_merge_is_cancelled_under_the_lock(volumes: Volumes, site: Site) -> None:
    killed(lambda die: chainmerge.merge(volumes.top, access=DEVICES, on_progress=die))
    arrange(volumes, SHARED["sanlock, shared"])
    with pytest.raises(VolumeShared):
        chainmerge.cancel(volumes.base)
    chainmerge.cancel(volumes.base, access=site.access)
    assert [line.split()[1] for line in site.asked] == ["lock", "unlock"]


@pytest.mark.parametrize(
    "error",
    [LvmUnfinished("/dev/vg/base", "lvm lvextend", 1, 330.0), MergeUnfinished("top", "no node")],
    ids=lambda error: error.code,
)
def test_the_lock_stays_if_something_may_still_write(
    volumes: Volumes, site: Site, error: chainmerge.ChainmergeError
) -> None:
    with (
        pytest.raises(type(error)),
        held_by_this_host([volumes.base, volumes.base], site.access),
    ):
        raise error
    assert site.asked == ["--quiet lock /dev/mapper/vg-base"]


@pytest.mark.parametrize("command", ["", "  ", "say 'what", "bin/lock", "./lock", "a\0b"])
def test_commands_that_cannot_be_run_from_anywhere(command: str) -> None:
    with pytest.raises(OptionUnusable):
        Access(lock_command=command)
