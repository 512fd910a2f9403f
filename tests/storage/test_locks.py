# SPDX-License-Identifier: Apache-2.0
"""Our locks against QEMU's own: each must respect the other's, in the other's words."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

import pytest

from chainmerge.storage import locks
from chainmerge.storage.errors import ImageLocked, ImageMissing, LocksUnsupported
from chainmerge.storage.locks import ImageLock, LockMode, contentions, lock_image
from tests.support.loopdev import loop_device
from tests.support.qemu import create, qemu_img, qemu_io, run

if TYPE_CHECKING:
    from collections.abc import Iterator

MODES: Final = {LockMode.READER: "on", LockMode.WRITER: "off"}
each_mode = pytest.mark.parametrize("mode", list(MODES), ids=lambda mode: mode.name.lower())

# What people do with images that may be in use.
COMMANDS: Final = {
    "info": ("qemu-img", "info"),
    "info of a shared image": ("qemu-img", "info", "-U"),
    "check": ("qemu-img", "check"),
    "bitmap": ("qemu-img", "bitmap", "--add", "-f", "qcow2", "{image}", "new"),
    "resize": ("qemu-img", "resize", "{image}", "+1M"),
    "rebase": ("qemu-img", "rebase", "-u", "-b", ""),
    "read": ("qemu-io", "-r", "-c", "read 0 64k"),
    "read of a shared image": ("qemu-io", "-r", "-U", "-c", "read 0 64k"),
    "write": ("qemu-io", "-c", "write 0 64k"),
}


@contextmanager
def daemon_holding(image: Path, mode: LockMode) -> Iterator[int]:
    """A storage daemon that has an image open; yields its pid."""
    driver = "host_device" if image.is_block_device() else "file"
    options = f"node-name=file,filename={image},read-only={MODES[mode]}"
    with TemporaryDirectory() as scratch:
        pidfile = Path(scratch) / "pid"
        # It daemonizes when it has opened everything, so there is nothing to wait for.
        run(
            "qemu-storage-daemon", "--daemonize", "--pidfile", pidfile,
            "--blockdev", f"driver={driver},{options}",
            "--blockdev", f"driver=qcow2,node-name=image,file=file,read-only={MODES[mode]}",
        )  # fmt: skip
        pid = int(pidfile.read_text())
        try:
            yield pid
        finally:
            end(pid)


def end(pid: int) -> None:
    """Kill a process, not necessarily a child of ours, and wait until it is gone."""
    process = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(process, signal.SIGKILL)
        select.select([process], [], [])
    finally:
        os.close(process)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return create(tmp_path / "image.qcow2", 16 << 20)


def outcome(command: str, image: Path) -> tuple[int, str]:
    words = [word.format(image=image) for word in COMMANDS[command]]
    argv = words if str(image) in words else [*words, str(image)]
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    return result.returncode, result.stderr


def held_bytes(pid: int, image: Path) -> set[int]:
    """The bytes of an image that a process has locked, as the kernel lists them."""
    inode = image.stat().st_ino
    held: set[int] = set()
    for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            lines = entry.read_text().splitlines()
        except FileNotFoundError:  # the descriptor by which we list them ourselves
            continue
        for line in lines:
            if "OFDLCK" in line and f":{inode} " in line:
                first, last = map(int, line.split()[-2:])
                held |= set(range(first, last + 1))
    return held


class TestLikeQemu:
    @each_mode
    def test_the_same_bytes(self, image: Path, mode: LockMode) -> None:
        with daemon_holding(image, mode) as pid:
            theirs = held_bytes(pid, image)
        with lock_image(image, mode, 0):
            ours = held_bytes(os.getpid(), image)
        assert ours == theirs

    @each_mode
    @pytest.mark.parametrize("command", COMMANDS)
    def test_commands_cannot_tell_us_from_qemu(
        self, image: Path, mode: LockMode, command: str
    ) -> None:
        with daemon_holding(image, mode):
            theirs = outcome(command, image)
        with lock_image(image, mode, 0):
            assert outcome(command, image) == theirs

    def test_what_that_means(self, image: Path) -> None:
        with lock_image(image, LockMode.WRITER, 0):
            assert 'Failed to get "write" lock' in outcome("write", image)[1]
            assert 'Failed to get shared "write" lock' in outcome("info", image)[1]
            assert outcome("info of a shared image", image)[0] == 0
        with lock_image(image, LockMode.READER, 0):
            assert 'Failed to get "write" lock' in outcome("write", image)[1]
            assert outcome("info", image)[0] == 0
        assert outcome("write", image) == (0, "")

    @each_mode
    def test_qemu_gets_in_after_release(self, image: Path, mode: LockMode) -> None:
        lock_image(image, mode, 0).release()
        qemu_io(image, "write 0 64k")


class TestRespectsQemu:
    @each_mode
    def test_a_writer_excludes_us(self, image: Path, mode: LockMode) -> None:
        with (
            daemon_holding(image, LockMode.WRITER) as pid,
            pytest.raises(ImageLocked) as caught,
        ):
            lock_image(image, mode, 0)
        assert caught.value.facts == {
            "image": str(image),
            "holder": f"qemu-storage-da (pid {pid})",  # the kernel keeps 15 bytes of a name
        }
        lock_image(image, mode, 0).release()

    def test_readers_share(self, image: Path) -> None:
        with daemon_holding(image, LockMode.READER) as pid:
            lock_image(image, LockMode.READER, 0).release()
            with pytest.raises(ImageLocked, match=rf"qemu-storage-da \(pid {pid}\)"):
                lock_image(image, LockMode.WRITER, 0)

    def test_every_holder_is_named(self, image: Path) -> None:
        with (
            daemon_holding(image, LockMode.READER) as pid,
            lock_image(image, LockMode.READER, 0),
            pytest.raises(ImageLocked) as caught,
        ):
            lock_image(image, LockMode.WRITER, 0)
        assert f"(pid {pid})" in caught.value.holder
        assert f"(pid {os.getpid()})" in caught.value.holder

    def test_failing_leaves_no_lock_behind(self, image: Path) -> None:
        with daemon_holding(image, LockMode.READER):
            with pytest.raises(ImageLocked):
                lock_image(image, LockMode.WRITER, 0)
            assert held_bytes(os.getpid(), image) == set()

    def test_the_same_image_under_another_name(self, image: Path, tmp_path: Path) -> None:
        (tmp_path / "soft").symlink_to(image)
        (tmp_path / "hard").hardlink_to(image)
        with daemon_holding(image, LockMode.WRITER) as pid:
            for name in ("soft", "hard"):
                with pytest.raises(ImageLocked, match=f"pid {pid}"):
                    lock_image(tmp_path / name, LockMode.READER, 0)

    @each_mode
    def test_block_devices(self, tmp_path: Path, mode: LockMode) -> None:
        with loop_device(tmp_path / "backing", 1 << 20) as device:
            create(device, 16 << 20)
            with lock_image(device, mode, 0):
                assert 'Failed to get "write" lock' in outcome("write", device)[1]
            qemu_io(device, "write 0 64k")
            with (
                daemon_holding(device, LockMode.WRITER) as pid,
                pytest.raises(ImageLocked, match=rf"\(pid {pid}\)"),
            ):
                lock_image(device, mode, 0)

    def test_where_stat_and_the_kernel_name_devices_differently(
        self, file_systems: dict[str, Path]
    ) -> None:
        """On Btrfs st_dev is the subvolume's, and the lists of locks have the file system's."""
        image = create(file_systems["btrfs"] / "image", 1 << 20)
        with (
            daemon_holding(image, LockMode.WRITER) as pid,
            pytest.raises(ImageLocked, match=rf"\(pid {pid}\)"),
        ):
            lock_image(image, LockMode.READER, 0)
        image.unlink()


class TestAmongOurselves:
    def test_two_locks_in_one_process_conflict(self, image: Path) -> None:
        me = rf"\(pid {os.getpid()}\)"
        with lock_image(image, LockMode.WRITER, 0):
            for mode in MODES:
                with pytest.raises(ImageLocked, match=me):
                    lock_image(image, mode, 0)
        with (
            lock_image(image, LockMode.READER, 0),
            lock_image(image, LockMode.READER, 0),
            pytest.raises(ImageLocked, match=me),
        ):
            lock_image(image, LockMode.WRITER, 0)
        lock_image(image, LockMode.WRITER, 0).release()

    def test_waits_for_the_holder(self, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        holder = lock_image(image, LockMode.WRITER, 0)
        pauses: list[float] = []

        def sleep(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 3:
                holder.release()

        monkeypatch.setattr(time, "sleep", sleep)
        waits: list[None] = []
        with lock_image(image, LockMode.WRITER, 3600, lambda: waits.append(None)) as lock:
            assert lock.fileno() >= 0
        assert pauses == [0.05] * 3
        assert len(waits) == 1, "told once, however long it takes"
        with lock_image(image, LockMode.WRITER, 3600, lambda: waits.append(None)):
            assert len(waits) == 1, "nobody had it"

    def test_gives_up_when_the_time_is_over(
        self, image: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = [1000.0]

        def sleep(seconds: float) -> None:
            clock[0] += seconds

        monkeypatch.setattr(time, "monotonic", lambda: clock[0])
        monkeypatch.setattr(time, "sleep", sleep)
        with lock_image(image, LockMode.WRITER, 0), pytest.raises(ImageLocked):
            lock_image(image, LockMode.WRITER, 0.12)
        assert clock[0] == pytest.approx(1000.12)

    def test_who_comes_in_between_our_looking_and_our_locking(
        self, image: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        others: list[ImageLock] = []
        set_lock = locks._set_lock

        def set_lock_too_late(fd: int, kind: int, byte: int) -> None:
            monkeypatch.setattr(locks, "_set_lock", set_lock)
            others.append(lock_image(image, LockMode.WRITER, 0))
            set_lock(fd, kind, byte)

        monkeypatch.setattr(locks, "_set_lock", set_lock_too_late)
        with pytest.raises(ImageLocked):
            lock_image(image, LockMode.WRITER, 0)
        assert held_bytes(os.getpid(), image) == set(LockMode.WRITER.own_bytes)
        others.pop().release()
        lock_image(image, LockMode.WRITER, 0).release()

    def test_looking_takes_no_byte(self, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A QEMU that starts while we wait for another must not trip over us."""
        taken: list[int] = []
        set_lock = locks._set_lock

        def watch(fd: int, kind: int, byte: int) -> None:
            taken.append(byte)
            set_lock(fd, kind, byte)

        with lock_image(image, LockMode.READER, 0):
            monkeypatch.setattr(locks, "_set_lock", watch)
            with pytest.raises(ImageLocked):
                lock_image(image, LockMode.WRITER, 0)
        assert not {byte for byte in taken if byte >= 100}

    def test_releasing_twice(self, image: Path) -> None:
        lock = lock_image(image, LockMode.READER, 0)
        lock.release()
        with lock_image(image, LockMode.READER, 0) as second:
            lock.release()
            assert held_bytes(os.getpid(), image) == set(second.mode.own_bytes)

    def test_other_descriptors_of_the_image_may_be_closed(self, image: Path) -> None:
        """Classic POSIX locks would be gone with the first of them."""
        with lock_image(image, LockMode.WRITER, 0):
            image.read_bytes()
            assert outcome("info", image)[0] == 1

    def test_nothing_to_lock(self, tmp_path: Path) -> None:
        with pytest.raises(ImageMissing):
            lock_image(tmp_path / "none", LockMode.READER, 0)


class TestInheritance:
    def test_a_child_keeps_the_lock(self, image: Path) -> None:
        lock = lock_image(image, LockMode.WRITER, 0)
        self._hand_over(lock, image, pass_fds=(lock.fileno(),))

    def test_every_child_when_shared(self, image: Path) -> None:
        lock = lock_image(image, LockMode.WRITER, 0)
        assert lock.share_with_child() == lock.fileno()
        self._hand_over(lock, image, close_fds=False)

    def test_no_child_by_default(self, image: Path) -> None:
        with lock_image(image, LockMode.WRITER, 0), child(close_fds=False) as other:
            assert held_bytes(other.pid, image) == set()

    @staticmethod
    def _hand_over(lock: ImageLock, image: Path, **options: object) -> None:
        with child(**options) as heir:
            lock.release()
            with pytest.raises(ImageLocked) as caught:
                lock_image(image, LockMode.READER, 0)
            assert caught.value.holder == f"cat (pid {heir.pid})"
            assert outcome("write", image)[0] == 1
        qemu_img("info", image)


@contextmanager
def child(**options: object) -> Iterator[subprocess.Popen[bytes]]:
    """A child that lives as long as the context."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, **options) as process:  # type: ignore[call-overload]
        yield process


REFUSE_LOCKS = """
import ctypes, errno, struct, sys
from chainmerge.storage.locks import LockMode, lock_image
from chainmerge.storage.errors import LocksUnsupported

F_OFD_GETLK, F_OFD_SETLK = 36, 37
LD_W_ABS, JEQ_K, RET_K = 0x20, 0x15, 0x06
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
second_argument = 16 + 8
program = [
    (LD_W_ABS, 0, 0, second_argument),
    (JEQ_K, 1, 0, F_OFD_GETLK),
    (JEQ_K, 0, 1, F_OFD_SETLK),
    (RET_K, 0, 0, ERRNO | int(sys.argv[2])),
    (RET_K, 0, 0, ALLOW),
]
code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
lock_image(sys.argv[1], LockMode.READER, 0).release()
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, header, 0, 0) == 0
try:
    lock_image(sys.argv[1], LockMode.READER, 60)
except LocksUnsupported as error:
    print(error.reason)
"""


@pytest.mark.parametrize(
    ("number", "reason"),
    [(22, "does not support open file description locks"), (37, "No locks available")],
)
def test_storage_without_locks(image: Path, number: int, reason: str) -> None:
    """The kernel (a seccomp filter) refuses the locks, as a file system without them would."""
    assert reason in run(sys.executable, "-c", REFUSE_LOCKS, image, str(number)).stdout
    assert LocksUnsupported("i", "r").exit_code == 3


def test_the_holders_of_many_locks_are_looked_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches = []
    search = locks._locks_of_all_processes

    def counted() -> Iterator[tuple[int, locks._KernelLock]]:
        searches.append(1)
        yield from search()

    monkeypatch.setattr(locks, "_locks_of_all_processes", counted)
    images = [create(tmp_path / f"{index}.qcow2", 1 << 20) for index in range(5)]
    with ExitStack() as stack:
        for path in images[:3]:
            stack.enter_context(lock_image(path, LockMode.WRITER, 0))
        wanted = [*((path, LockMode.READER) for path in images), (tmp_path / "no", LockMode.READER)]
        refusals = list(contentions(wanted))
        assert list(contentions([(images[4], LockMode.READER)])) == []
    assert [type(refusal) for refusal in refusals] == [*[ImageLocked] * 3, ImageMissing]
    assert [refusal.facts["image"] for refusal in refusals] == [
        *map(str, images[:3]),
        str(tmp_path / "no"),
    ]
    assert all(f"(pid {os.getpid()})" in refusal.facts["holder"] for refusal in refusals[:3])
    assert len(searches) == 1
    assert list(contentions((path, LockMode.WRITER) for path in images)) == []
