# SPDX-License-Identifier: Apache-2.0
"""A real QEMU with a disk and without a guest system, whose disk an NBD client writes to.

The VM's processor is stopped (``-S``), its virtio disk is real, and the guest's writes come in
by an export of the disk's active node: in a merge it goes where the device goes.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from chainmerge import live
from chainmerge.live.qmp.monitor import Monitor
from tests.support.nbd import NbdClient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

DEVICE = "disk0"
SECTOR = 512


@dataclass
class LiveTestVm:
    """A running VM: ``qmp`` is the socket for the merge, the test has another."""

    directory: Path
    process: subprocess.Popen[bytes]
    monitor: Monitor
    qmp: Path
    nbd: Path

    @property
    def arguments(self) -> tuple[str, ...]:
        """The options of ``chainmerge live`` that lead to the disk."""
        return ("--qmp", str(self.qmp), "--device", DEVICE)

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command; underscores in the names of arguments become dashes."""
        plain = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self.monitor.execute(command, plain)

    def chain(self) -> list[str]:
        """The names of the files of the disk's chain, the active one first."""
        (disk,) = self.execute("query-block")
        image: dict[str, Any] | None = disk["inserted"]["image"]
        names = []
        while image is not None:
            names.append(_file_name(image["filename"]))
            image = image.get("backing-image")
        return names

    def bitmaps(self, image: str) -> dict[str, dict[str, Any]]:
        """The named bitmaps of the image with that file name, by their names."""
        nodes = self.execute("query-named-block-nodes", flat=True)
        node = next(
            node
            for node in nodes
            if _file_name(node["file"]) == image and node["drv"] not in ("file", "host_device")
        )
        return {
            bitmap["name"]: bitmap for bitmap in node.get("dirty-bitmaps", ()) if "name" in bitmap
        }

    def jobs(self) -> list[str]:
        """The statuses of all jobs."""
        return [job["status"] for job in self.execute("query-jobs")]

    def export(self) -> None:
        """Let an NBD client be the guest, on the node that the disk reads now."""
        self.serve_nbd()
        (disk,) = self.execute("query-block")
        self.execute(
            "block-export-add",
            id="guest",
            type="nbd",
            name="disk",
            writable=True,
            node_name=disk["inserted"]["node-name"],
        )

    def serve_nbd(self) -> None:
        """Have exports served at the socket ``nbd``."""
        self.nbd.unlink(missing_ok=True)
        directory = os.open(self.directory, os.O_PATH)
        try:
            path = f"/proc/{os.getpid()}/fd/{directory}/{self.nbd.name}"
            self.execute("nbd-server-start", addr={"type": "unix", "data": {"path": path}})
        finally:
            os.close(directory)

    def client(self) -> NbdClient:
        """A connection to the guest's disk."""
        return NbdClient(self.nbd, "disk")

    def disk(self) -> live.QmpVm:
        """The VM's disk, for a merge."""
        return live.QmpVm(str(self.qmp), device=DEVICE)

    def guest(self, seed: int, disk_size: int) -> Guest:
        """Somebody who writes to the disk."""
        return Guest(self, seed, disk_size)

    @staticmethod
    def write_on(client: NbdClient, offset: int, data: bytes) -> None:
        """Have the guest write."""
        client.write(offset, data)

    def kill(self) -> None:
        """As a crash of the machine, as far as its memory goes."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def quit(self) -> None:
        """An orderly end: images are closed, bitmaps stored."""
        with contextlib.suppress(Exception):
            self.execute("quit")
        self.process.wait(60)

    @property
    def alive(self) -> bool:
        """Whether QEMU runs."""
        return self.process.poll() is None


def _file_name(filename: str) -> str:
    """The file's name, from what QEMU tells where a header has it differently."""
    if filename.startswith("json:"):
        filename = json.loads(filename.removeprefix("json:"))["file"]["filename"]
    return Path(filename).name


def separate_nodes(images: Sequence[Path]) -> list[str]:
    """Command line: a node for each image and for each file, as libvirt has it."""
    return disk_of_nodes(images, DEVICE, "")


def disk_of_nodes(images: Sequence[Path], device: str, prefix: str) -> list[str]:
    """Command line: a disk with that id, the names of whose nodes begin with *prefix*."""
    options = []
    for index, image in enumerate(images):
        driver = "host_device" if image.is_block_device() else "file"
        protocol = {
            "driver": driver,
            "node-name": f"{prefix}file{index}",
            "filename": str(image),
            "auto-read-only": True,
            "discard": "unmap",
        }
        node = {
            "driver": "qcow2",
            "node-name": f"{prefix}image{index}",
            "read-only": index < len(images) - 1,
            "file": f"{prefix}file{index}",
            "backing": f"{prefix}image{index - 1}" if index else None,
            "discard": "unmap",
        }
        options += ["-blockdev", json.dumps(protocol), "-blockdev", json.dumps(node)]
    active = f"{prefix}image{len(images) - 1}"
    disk = f"virtio-blk-pci,id={device},drive={active},serial={device},share-rw=on"
    return [*options, "-device", disk]


def one_drive(images: Sequence[Path]) -> list[str]:
    """Command line: ``-drive``; QEMU opens the chain by its headers and makes up node names."""
    return [
        "-drive",
        f"if=none,id=drive0,file={images[-1]},format=qcow2,discard=unmap",
        "-device",
        f"virtio-blk-pci,id={DEVICE},drive=drive0,share-rw=on",
    ]


@contextlib.contextmanager
def running_vm(
    directory: Path,
    images: Sequence[Path],
    command_line: Callable[[Sequence[Path]], list[str]] = separate_nodes,
) -> Iterator[LiveTestVm]:
    """A VM whose disk is the chain *images*, root first; it is killed at the end."""
    with running_qemu(directory, command_line(images)) as vm:
        vm.export()
        yield vm


@contextlib.contextmanager
def running_qemu(directory: Path, disks: Sequence[str]) -> Iterator[LiveTestVm]:
    """A VM with the disks of a command line; it is killed at the end."""
    directory.mkdir(parents=True, exist_ok=True)
    qmp, test, nbd = (directory / name for name in ("qmp", "test", "nbd"))
    with contextlib.ExitStack() as stack:
        # QEMU is given sockets that listen already: there is nothing to wait for.
        sockets = [stack.enter_context(listening(path)) for path in (qmp, test)]
        process = subprocess.Popen(
            [
                "setpriv", "--pdeathsig", "KILL", "--",
                "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-m", "64", "-S",
                "-nodefaults", "-display", "none", "-monitor", "none",
                *_monitor("qmp", sockets[0].fileno()), *_monitor("test", sockets[1].fileno()),
                *disks,
            ],
            stdin=subprocess.DEVNULL,
            pass_fds=[one.fileno() for one in sockets],
        )  # fmt: skip
        stack.callback(_end, process)
        for one in sockets:
            one.close()
        monitor = stack.enter_context(Monitor(str(test)))
        yield LiveTestVm(directory, process, monitor, qmp, nbd)


def listening(path: Path) -> socket.socket:
    """A socket that listens at a path, to be handed on."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    # Names of sockets are short, those of directories for tests are not.
    directory = os.open(path.parent, os.O_PATH)
    try:
        listener.bind(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.close(directory)
    listener.listen(8)
    return listener


def _monitor(name: str, fd: int) -> list[str]:
    return [
        "-chardev",
        f"socket,id={name},fd={fd},server=on,wait=off",
        "-mon",
        f"chardev={name},mode=control",
    ]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@dataclass(frozen=True)
class Written:
    """A write of the guest's: what a byte at a place is from then on."""

    offset: int
    length: int
    letter: int


@dataclass
class Guest:
    """Writes to the disk in a thread of its own, and keeps a journal of what it has written.

    Attributes:
        vm: The VM.
        seed: Of what is written, and where.
        disk_size: Bytes of the disk.
        largest: Bytes of a write at most.
        flushes: Whether every write is made durable before it counts.
        interval: Seconds that it does something else after a write.
        under_way: The write that is not answered yet.
    """

    vm: LiveTestVm
    seed: int
    disk_size: int
    largest: int = 64 << 10
    flushes: bool = False
    interval: float = 0.002
    under_way: Written | None = None
    journal: list[Written] = field(default_factory=list)
    error: BaseException | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _progress: threading.Condition = field(default_factory=threading.Condition)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()
        self.wait_for(1)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def has_stopped(self, within: float) -> bool:
        """Ask it to stop, and say whether its last write is answered within so many seconds."""
        self._stop.set()
        assert self._thread is not None
        self._thread.join(within)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """End the last write, and raise what the guest has met."""
        self._stop.set()
        assert self._thread is not None
        self._thread.join()
        if self.error is not None and self.vm.alive:
            raise self.error

    def wait_for(self, writes: int) -> None:
        """Wait until the guest has written so many times."""
        with self._progress:
            self._progress.wait_for(
                lambda: len(self.journal) >= writes or self.error is not None, timeout=60
            )
        if self.error is not None:
            raise self.error

    def _write(self) -> None:
        random_ = random.Random(self.seed)
        try:
            with self.vm.client() as disk:
                while not self._stop.is_set():
                    self._write_once(disk, random_)
                    # Guests do other things, too; without this the copy never catches up.
                    self._stop.wait(self.interval)
        except BaseException as error:
            self.error = error
        finally:
            with self._progress:
                self._progress.notify_all()

    def _write_once(self, disk: NbdClient, random_: random.Random) -> None:
        length = random_.randrange(1, self.largest // SECTOR + 1) * SECTOR
        offset = random_.randrange(0, (self.disk_size - length) // SECTOR + 1) * SECTOR
        written = Written(offset, length, random_.randrange(1, 256))
        self.under_way = written
        disk.write(offset, bytes([written.letter]) * length)
        if self.flushes:
            disk.flush()
        with self._progress:
            self.journal.append(written)
            self._progress.notify_all()

    def applied_to(self, content: bytes) -> bytes:
        """What the disk holds if it held *content* before the first write."""
        disk = bytearray(content)
        for one in self.journal:
            disk[one.offset : one.offset + one.length] = bytes([one.letter]) * one.length
        return bytes(disk)

    def count_what_is_under_way(self) -> None:
        """Take the write that nobody answered for done."""
        assert self.under_way is not None
        self.journal.append(self.under_way)

    def may_be(self, before: bytes, now: bytes) -> bool:
        """Whether the disk can hold *now*: a write that nobody answered may be there or not."""
        expected = self.applied_to(before)
        if now == expected or self.under_way is None or self.under_way in self.journal[-1:]:
            return now == expected
        start, end = self.under_way.offset, self.under_way.offset + self.under_way.length
        inside = set(now[start:end]) <= {self.under_way.letter, *expected[start:end]}
        return inside and now[:start] + now[end:] == expected[:start] + expected[end:]

    def dirty(self, granularity: int) -> set[int]:
        """The granules that were written to."""
        return granules_of(self.journal, granularity)


def granules_of(writes: Sequence[Written], granularity: int) -> set[int]:
    """The granules that some writes touch."""
    return {
        granule
        for one in writes
        for granule in range(
            one.offset // granularity, -(-(one.offset + one.length) // granularity)
        )
    }
