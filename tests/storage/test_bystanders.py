# SPDX-License-Identifier: Apache-2.0
"""Who uses an image beside QEMU's locks is found and named, and nobody else is."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from chainmerge.storage.bystanders import Wanted, bystanders_of
from chainmerge.storage.locks import LockMode, lock_image
from tests.support.loopdev import loop_device, mounted
from tests.support.qemu import create, run

if TYPE_CHECKING:
    from collections.abc import Iterator

HOLD: Final = """
import fcntl, os, sys
fd = os.open(sys.argv[1], getattr(os, sys.argv[2]))
if sys.argv[3]:
    fcntl.flock(fd, fcntl.LOCK_SH)
print("ready", flush=True)
sys.stdin.read()
"""
# Started by a shell that ends, it is nobody's child.
DETACHED: Final = 'exec 3<&0; "$@" <&3 & echo $!'


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return create(tmp_path / "image.qcow2", 16 << 20)


@contextmanager
def held(path: Path, how: str = "O_RDONLY", flock: str = "") -> Iterator[int]:
    """A process that has *path* open and is no child of ours; yields its id."""
    argv = ["sh", "-c", DETACHED, "sh", sys.executable, "-c", HOLD, str(path), how, flock]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as shell:
        assert shell.stdout is not None
        assert shell.stdin is not None
        said = {shell.stdout.readline(), shell.stdout.readline()} - {b"ready\n"}
        shell.wait()
        try:
            yield int(said.pop())
        finally:
            shell.stdin.close()
            shell.stdout.read()


def found(*wanted: Wanted) -> list[tuple[str, bool]]:
    return [(one.name, one.excludes) for one in bystanders_of(wanted)]


def excluding(*wanted: Wanted) -> list[str]:
    """Those that keep others away. Other tests look at all devices for a moment."""
    return [name for name, excludes in found(*wanted) if excludes]


def writer(path: Path) -> Wanted:
    return Wanted(path, LockMode.WRITER)


def reader(path: Path) -> Wanted:
    return Wanted(path, LockMode.READER)


class TestFiles:
    @pytest.mark.parametrize("flock", ["", "yes"])
    @pytest.mark.parametrize("how", ["O_RDWR", "O_WRONLY"])
    def test_a_writer_excludes(self, image: Path, how: str, flock: str) -> None:
        with held(image, how, flock) as pid:
            for wanted in (writer(image), reader(image)):
                ((name, excludes),) = found(wanted)
                assert name.endswith(f"(pid {pid})")
                assert excludes

    def test_a_reader_is_named_where_the_content_changes(self, image: Path) -> None:
        with held(image):
            assert [excludes for _, excludes in found(writer(image))] == [False]
            assert found(reader(image)) == []
            dies = Wanted(image, LockMode.READER, dies=True)
            assert [excludes for _, excludes in found(dies)] == [False]

    def test_by_whatever_name_and_of_whichever_disk(self, image: Path, tmp_path: Path) -> None:
        other = create(tmp_path / "other.qcow2", 1 << 20)
        hard, soft = tmp_path / "hard", tmp_path / "soft"
        hard.hardlink_to(image)
        soft.symlink_to(image)
        with held(hard, "O_RDWR") as pid:
            image.unlink()
            users = bystanders_of([writer(other), writer(soft), writer(hard)])
        assert [(user.image, user.excludes) for user in users] == [(str(hard), True)]
        assert f"(pid {pid})" in users[0].name

    def test_who_asks_for_locks_is_left_to_them(self, image: Path) -> None:
        with qemu_with(image):
            assert found(writer(image), reader(image)) == []

    def test_a_qemu_that_locks_nothing(self, image: Path) -> None:
        with qemu_with(image, "locking=off") as pid:
            ((name, excludes),) = found(reader(image))
        assert name == f"qemu-storage-da (pid {pid})"
        assert excludes

    def test_we_and_our_children_are_no_users(self, image: Path) -> None:
        argv = [sys.executable, "-c", HOLD, str(image), "O_RDWR", ""]
        with (
            image.open("r+b"),
            lock_image(image, LockMode.WRITER, 0),
            subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child,
        ):
            assert child.stdout is not None
            child.stdout.readline()
            assert found(writer(image)) == []

    def test_who_may(self, image: Path) -> None:
        with held(image, "O_RDWR") as pid:
            assert bystanders_of([writer(image)], frozenset({pid})) == ()

    def test_an_image_that_is_not_there(self, image: Path, tmp_path: Path) -> None:
        assert found(writer(tmp_path / "none"), writer(image)) == []
        assert bystanders_of([]) == ()


class TestDevices:
    def test_through_a_loop_device_over_the_file(self, image: Path) -> None:
        with loop_device(image, 1 << 20) as device:
            assert excluding(writer(image)) == []
            with held(device, "O_RDWR") as pid:
                assert excluding(reader(image)) == [f"{process(pid)} through {device}"]

    def test_through_a_device_over_a_device(self, image: Path) -> None:
        with (
            loop_device(image, 1 << 20) as lower,
            loop_on(lower) as upper,
            held(upper, "O_RDWR") as pid,
        ):
            for place in (image, lower):
                assert f"{process(pid)} through {upper}" in dict(found(writer(place)))

    def test_the_file_below_our_device(self, image: Path) -> None:
        with loop_device(image, 1 << 20) as device:
            assert excluding(writer(device)) == []
            with held(image, "O_RDWR") as pid:
                ((name, excludes),) = found(writer(device))
        assert name.startswith(f"{process(pid)} through the file below")
        assert excludes

    def test_a_file_that_was_renamed_under_its_device(self, image: Path) -> None:
        with loop_device(image, 1 << 20) as device:
            moved = image.rename(image.with_name("moved"))
            create(image, 1 << 20)
            with held(device, "O_RDWR"):
                assert found(writer(image)) == []
                assert len(found(writer(moved))) == 1

    def test_a_file_system_on_it(self, tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        with loop_device(disk, 32 << 20) as device:
            run("mkfs.ext4", "-q", device)
            (tmp_path / "here").mkdir()
            with mounted(device, tmp_path / "here"):
                for place in (disk, device):
                    ((name, excludes),) = found(writer(place))
                    assert f"the file system mounted at {tmp_path / 'here'}" in name
                    assert excludes
            assert excluding(writer(disk), writer(device)) == []

    def test_who_has_it_exclusively(self, tmp_path: Path) -> None:
        with loop_device(tmp_path / "disk", 1 << 20) as device:
            mine = os.open(device, os.O_RDONLY | os.O_EXCL)
            try:
                ((name, excludes),) = found(writer(device))
            finally:
                os.close(mine)
        assert "O_EXCL" in name
        assert excludes

    @pytest.mark.parametrize("mode", ["on", "off"])
    def test_a_qemu_with_a_node_of_its_own(self, tmp_path: Path, mode: str) -> None:
        """Its locks are on that node, and are heeded all the same."""
        with loop_device(tmp_path / "disk", 1 << 20) as device:
            create(device, 16 << 20)
            number = device.stat().st_rdev
            node = tmp_path / "node"
            os.mknod(node, 0o600 | 0o060000, number)
            with lock_image(device, LockMode.READER, 0), qemu_with(node, f"read-only={mode}"):
                users = found(writer(device))
                assert [excludes for _, excludes in users] == [True]
                assert [excludes for _, excludes in found(reader(device))] == [True] * (
                    mode == "off"
                )


def process(pid: int) -> str:
    name = Path(f"/proc/{pid}/comm").read_text().strip()
    return f"{name} (pid {pid})"


@contextmanager
def loop_on(device: Path) -> Iterator[Path]:
    upper = Path(run("losetup", "--find", "--show", device).stdout.strip())
    try:
        yield upper
    finally:
        run("losetup", "--detach", upper)


@contextmanager
def qemu_with(image: Path, *options: str) -> Iterator[int]:
    """A storage daemon of nobody's that has an image open; yields its id."""
    driver = "host_device" if image.is_block_device() else "file"
    pidfile = image.with_name("daemon.pid")
    mode = next((one for one in options if one.startswith("read-only=")), "read-only=off")
    protocol = ",".join([f"driver={driver},node-name=file,filename={image}", *options])
    qcow2 = f"driver=qcow2,node-name=image,file=file,{mode}"
    run(
        "qemu-storage-daemon", "--daemonize", "--pidfile", pidfile,
        "--blockdev", protocol, "--blockdev", qcow2,
    )  # fmt: skip
    pid = int(pidfile.read_text())
    gone = os.pidfd_open(pid)
    try:
        yield pid
    finally:
        signal.pidfd_send_signal(gone, signal.SIGKILL)
        select.select([gone], [], [])
        os.close(gone)
