# SPDX-License-Identifier: Apache-2.0
"""Where users of an image are looked for: mounts, links, devices, and where hosts keep images."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chainmerge.chain.discovery import discover
from chainmerge.chain.errors import TooManyFiles
from chainmerge.chain.managers import ManagedPlace, managed_places
from chainmerge.chain.model import ChainPolicy
from chainmerge.chain.relatives import Relatives, find_relatives
from chainmerge.chain.surroundings import folded
from chainmerge.documents.images import Searched
from chainmerge.storage.mounts import Mounts, mounts
from tests.chain.overlays import SIZE, overlay
from tests.support import qemu
from tests.support.live_vm import running_vm
from tests.support.loopdev import mounted_tmpfs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """The upper one of two images in a directory of their own."""
    home = tmp_path / "home" / "vm"
    home.mkdir(parents=True)
    qemu.create(home / "base", SIZE)
    return overlay(home / "top", "base")


def relatives_of(top: Path, search: Sequence[Path] = ()) -> Relatives:
    return find_relatives(discover(top, ChainPolicy()), 0, search)


def children_of(found: Relatives) -> list[Path]:
    return [image.path for image in found.children]


# File systems


def test_what_is_mounted_from_elsewhere_is_not_entered_but_said(top: Path, tmp_path: Path) -> None:
    beside = tmp_path / "home" / "beside"
    beside.mkdir()
    with mounted_tmpfs(beside, 1 << 20) as mounted:
        child = overlay(mounted / "child", top)
        found = relatives_of(top)
        assert children_of(found) == []
        assert any(str(mounted) in one for one in found.searched.left_out)
        # Not even below a directory that is named; only if it is named itself.
        found = relatives_of(top, [tmp_path])
        assert children_of(found) == []
        assert any(str(mounted) in one for one in found.searched.left_out)
        assert children_of(relatives_of(top, [mounted])) == [child]


def test_a_chain_over_two_file_systems_is_searched_on_both(tmp_path: Path) -> None:
    (tmp_path / "vm" / "1").mkdir(parents=True)
    with mounted_tmpfs(tmp_path, 1 << 20) as mounted:
        (mounted / "base").mkdir()
        (mounted / "other").mkdir()
        base = qemu.create(mounted / "base" / "base", SIZE)
        top = overlay(tmp_path / "vm" / "1" / "top", base)
        sibling = overlay(mounted / "other" / "sibling", base)
        (tmp_path / "vm" / "2").mkdir()
        child = overlay(tmp_path / "vm" / "2" / "child", top)
        chain = discover(top, ChainPolicy(allow_backing=(mounted,)))
        found = find_relatives(chain, 0)
        assert [image.path for image in found.siblings] == [sibling]
        assert children_of(found) == [child]


def test_mount_points_with_odd_names(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_bytes(
        b"22 1 254:0 / / rw - ext4 /dev/vda rw\n"
        b"23 22 0:40 / /a\\040b\\134c rw shared:1 - tmpfs t rw\n"
        b"24 22 0:41 / /a\\040b\\134c rw - tmpfs t rw\n"
        b"25 22 0:42 / /\xff rw - tmpfs t rw\n"
        b"broken\n"
    )
    found = mounts(table)
    assert found.file_system_of("/a b\\c/d/e") == "0:41"
    assert found.file_system_of("/a b\\cd") == "254:0"
    assert found.file_system_of("/\udcff") == "0:42"
    assert mounts(tmp_path / "none") == Mounts({})
    assert mounts(tmp_path / "none").file_system_of("/a/b") == ""


# What else is in a directory


def test_nothing_that_lies_around_can_hold_a_search_up(top: Path, tmp_path: Path) -> None:
    beside = tmp_path / "home" / "beside"
    beside.mkdir()
    os.mkfifo(beside / "pipe")
    (beside / "loop").symlink_to("loop")
    (beside / "up").symlink_to("..")
    (beside / "terminal").symlink_to("/dev/tty")
    (beside / b"\xff\n".decode("utf-8", "surrogateescape")).write_bytes(b"QFI\xfb")
    (beside / "short").write_bytes(b"QFI")
    overlay(beside / "cut", top)
    os.truncate(beside / "cut", 4096)
    child = overlay(beside / "child", top)
    found = relatives_of(top)
    assert children_of(found) == [child]
    # QEMU does not open it either, but it says what it stands on.
    assert [path for path, _ in found.unreadable] == [beside / "cut"]
    assert found.unknown == set()


def test_a_file_further_away_that_cannot_be_read_is_said(
    top: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = tmp_path / "home" / "beside"
    beside.mkdir()
    broken = overlay(beside / "broken", top)
    pread = os.pread

    def failing(fd: int, length: int, offset: int) -> bytes:
        if Path(f"/proc/self/fd/{fd}").readlink() == broken:
            raise OSError(5, "Input/output error")
        return pread(fd, length, offset)

    monkeypatch.setattr(os, "pread", failing)
    found = relatives_of(top)
    assert found.unknown == set()
    assert f"{broken} (not readable)" in found.searched.left_out
    # Where the user has named it, it may be what he is after.
    found = relatives_of(top, [tmp_path])
    assert found.unknown == {broken}


def test_a_place_that_is_named_is_looked_at_as_a_whole_or_not_at_all(
    top: Path, tmp_path: Path
) -> None:
    deep = tmp_path / "far" / "1" / "2" / "3" / "4" / "5"
    deep.mkdir(parents=True)
    child = overlay(deep / "child", top)
    (tmp_path / "far" / "linked").symlink_to(tmp_path / "home")
    found = relatives_of(top, [tmp_path / "far"])
    assert children_of(found) == [child]
    assert f"{tmp_path}/far/linked (behind a symbolic link)" in found.searched.left_out
    chain = discover(top, ChainPolicy())
    with pytest.raises(TooManyFiles):
        find_relatives(chain, 0, [tmp_path / "far"], max_files=6)


def test_a_directory_that_is_gone_in_the_middle_is_no_error(
    top: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = tmp_path / "home" / "beside"
    (beside / "below").mkdir(parents=True)
    scandir = os.scandir

    def vanishing(directory: str) -> object:
        found = scandir(directory)
        if directory == str(beside):
            qemu.run("rm", "-r", beside)
        return found

    monkeypatch.setattr(os, "scandir", vanishing)
    assert children_of(relatives_of(top)) == []


def test_the_same_directory_by_two_names_is_read_once(top: Path) -> None:
    found = relatives_of(top, [top.parent, top.parent / ".", top.parent.parent])
    assert found.searched.directories[0] == str(top.parent)
    assert found.siblings == ()


# Devices


def test_devices_are_looked_for_among_devices(
    device_directory: Path, loop_device: Callable[[str], Path]
) -> None:
    """Volumes of another group: a directory under /dev for each."""
    base, sibling = loop_device("base"), loop_device("sibling")
    other = device_directory / "other-group"
    (device_directory / "group").mkdir()
    (device_directory / "group" / "base").symlink_to(base)
    qemu.create(base, SIZE)
    overlay(sibling, base)
    top = Path(f"{device_directory}-top")
    other = Path(f"{device_directory}-other")
    other.mkdir()
    (other / "sibling").symlink_to(sibling)
    try:
        top.symlink_to(loop_device("top"))
        overlay(top, device_directory / "group" / "base")
        policy = ChainPolicy(allow_backing=(device_directory,))
        found = find_relatives(discover(top, policy), 0)
        assert sibling.stat().st_rdev in {image.identity[1] for image in found.siblings}
    finally:
        top.unlink()
        shutil.rmtree(other)


@pytest.mark.parametrize("by", ["file", "device"])
def test_a_loop_device_and_the_file_below_it_are_one_image(
    tmp_path: Path, loop_device: Callable[[str], Path], by: str
) -> None:
    device = loop_device("volume")
    (tmp_path / "home").mkdir()
    base = qemu.create(tmp_path / "home" / "base", SIZE)
    overlay(device, base)
    other = tmp_path / "home" / "top"
    other.symlink_to(device if by == "device" else tmp_path / "volume")
    chain = discover(other, ChainPolicy(allow_backing=(tmp_path,)))
    # The file lies beside, and all devices are looked at.
    found = find_relatives(chain, 0, [tmp_path, device])
    assert found.siblings == ()


# Where hosts keep images

POOL = "<pool type='dir'>\n <name>x</name><target>\n <path>{}</path></target></pool>"
DOMAIN = """<domain><devices><disk type='file'><source file='{}'/><target dev='vda'/></disk>
<disk type="block"><source startupPolicy="optional" dev="{}"/></disk>
<interface><source network='default'/></interface></devices></domain>"""


def test_the_files_of_libvirt_and_proxmox(tmp_path: Path) -> None:
    for directory in ("etc/libvirt/storage", "etc/libvirt/qemu", "etc/pve", "run/libvirt/qemu"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "etc/libvirt/storage/pool.xml").write_text(POOL.format("/pool &amp; more"))
    (tmp_path / "etc/libvirt/storage/other.txt").write_text(POOL.format("/not"))
    (tmp_path / "etc/libvirt/qemu/vm.xml").write_text(DOMAIN.format("/vms/a/disk", "/dev/vg/lv"))
    (tmp_path / "run/libvirt/qemu/vm.xml").write_bytes(b"<source file='/run/\xff/x'/><source file=")
    (tmp_path / "etc/pve/storage.cfg").write_text(
        "dir: local\n\tpath /var/lib/vz/\n\tcontent iso\n\nlvm: x\n\tvgname path\n\n"
        "nfs: far\n\tpath /mnt/pve/far\n"
    )
    assert managed_places(tmp_path) == (
        ManagedPlace("/pool & more"),
        ManagedPlace("/vms/a"),
        ManagedPlace("/dev/vg"),
        ManagedPlace("/run/\udcff"),
        ManagedPlace("/var/lib/vz/images", 1),
        ManagedPlace("/mnt/pve/far/images", 1),
    )


def test_a_host_without_any_of_it(tmp_path: Path) -> None:
    assert managed_places(tmp_path) == ()


def test_what_a_running_qemu_has_open(tmp_path: Path) -> None:
    """A clone that lies where nobody would look, but that runs."""
    (tmp_path / "home").mkdir()
    far = tmp_path / "a" / "b" / "c" / "d" / "e"
    far.mkdir(parents=True)
    base = qemu.create(tmp_path / "home" / "base", SIZE)
    top = overlay(tmp_path / "home" / "top", base)
    clone = qemu.create(far / "clone", backing=base)
    assert relatives_of(top).siblings == ()
    with running_vm(tmp_path / "vm", (base, clone)):
        found = relatives_of(top)
    assert [image.path for image in found.siblings] == [clone]
    assert str(far) in found.searched.directories


# Words


def test_where_was_looked_in_words() -> None:
    searched = Searched(("/a", "/b"), ("/c",), ("/d",))
    assert searched.places == "/a, /b, /c with everything below, up to 3 levels below /d"
    assert Searched(("/a",)).places == "/a"
    assert folded(["1", "2", "3"]) == "1, 2, 3"
    assert folded(["1", "2", "3", "4"]) == "1, 2, 3 and 1 more"
