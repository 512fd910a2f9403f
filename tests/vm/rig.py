# SPDX-License-Identifier: Apache-2.0
"""A virtual machine with a kernel of its own: logical volumes, device mapper, power cuts.

``scripts/vm/image`` builds what it boots. A command runs in it as root, in the project's
directory, which is there under the same path; what it prints comes out here, and so does its
exit status. It boots in seconds, without KVM (``CHAINMERGE_VM_ACCEL=kvm`` asks for that).
``python -m tests.vm.rig COMMAND...`` tries it.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

PROJECT: Final = Path(__file__).parents[2]
MIB: Final = 1 << 20

_VIRTIOFSD: Final = (Path("/usr/libexec/virtiofsd"), Path("/usr/lib/qemu/virtiofsd"))
_KERNEL: Final = (
    "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off nokaslr audit=0 random.trust_cpu=on "
    "no_timer_check tsc=reliable cryptomgr.notests rcupdate.rcu_expedited=1 init_on_alloc=0 lsm= "
    "nowatchdog"
)
# What a soak of everything can take on a busy machine.
_PATIENCE_SECONDS: Final = 4 * 3600.0
_POLL_SECONDS: Final = 1.0


class MachineFailed(AssertionError):
    """The machine ended without handing out the command's exit status."""


@dataclass(frozen=True)
class Disk:
    """A disk of the machine: ``/dev/disk/by-id/virtio-NAME``.

    Attributes:
        name: at most 20 characters.
        file: holds its content; made, sparse, where it does not exist.
        size: in bytes.
        sector_size: of the device, logical and physical.
    """

    name: str
    file: Path
    size: int
    sector_size: int = 512


@dataclass
class Machine:
    """A machine that runs a command.

    Attributes:
        process: QEMU.
        console: where the kernel's messages go.
        output: what the command has printed, line by line.
        printed: set whenever a line is added.
    """

    process: subprocess.Popen[bytes]
    console: Path
    _status: socket.socket
    _pump: threading.Thread
    output: list[str]
    printed: threading.Event

    def wait(self, seconds: float = _PATIENCE_SECONDS) -> int:
        """The command's exit status, once it has ended.

        Raises:
            MachineFailed: there is none: the kernel died, or somebody cut the power.
        """
        status = self.power_lost(seconds)
        if status is None:
            messages = self.console.read_text(errors="replace").splitlines()[-8:]
            raise MachineFailed("\n".join(["the machine ended without a status", *messages]))
        return status

    def power_lost(self, seconds: float = _PATIENCE_SECONDS) -> int | None:
        """Wait for the machine's end; the command's exit status if it had come to one."""
        self.process.wait(seconds)
        self._pump.join()
        with self._status.makefile() as told:
            status = told.read().strip()
        return int(status) if status else None

    def wait_for_output(self) -> None:
        """Return when something has been printed, or after a while."""
        self.printed.wait(_POLL_SECONDS)
        self.printed.clear()

    def kill_after(self, seconds: float) -> None:
        """End the machine after a while. What it had given to its disks by then stays there."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()


@contextmanager
def booted(
    command: Sequence[str],
    disks: Sequence[Disk] = (),
    environment: Mapping[str, str] | None = None,
    echo: IO[str] | None = None,
    more: Sequence[str] = (),
) -> Iterator[Machine]:
    """A machine that boots and runs *command*; it is ended when the block is left.

    Args:
        command: run in the project's directory.
        disks: of the machine, besides the one it boots from.
        environment: additional variables for the command.
        echo: where the command's output goes as it comes, besides ``Machine.output``.
        more: arguments for QEMU.
    """
    with (
        tempfile.TemporaryDirectory(prefix="chainmerge-vm-") as scratch,
        _shared_directory(Path(scratch)) as share,
    ):
        directory = Path(scratch)
        (directory / "environment").write_text(f"RIG_SHARE={shlex.quote(str(PROJECT))}\n")
        lines = [
            f"export {name}={shlex.quote(value)}" for name, value in (environment or {}).items()
        ]
        (directory / "command").write_text("\n".join([*lines, f"exec {shlex.join(command)}", ""]))
        output, output_there = socket.socketpair()
        status, status_there = socket.socketpair()
        console = directory / "console"
        argv = [
            *_machine(directory, disks), *share, *more, "-serial", f"file:{console}",
            *_port(1, "rig.output", output_there), *_port(2, "rig.status", status_there),
        ]  # fmt: skip
        with output_there, status_there:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                pass_fds=(output_there.fileno(), status_there.fileno()),
            )
        lines_read: list[str] = []
        printed = threading.Event()
        pump = threading.Thread(
            target=_read_lines, args=(output, lines_read, printed, echo), daemon=True
        )
        pump.start()
        try:
            yield Machine(process, console, status, pump, lines_read, printed)
        finally:
            process.kill()
            process.wait()
            pump.join()
            output.close()
            status.close()


def image() -> Path:
    """The directory of what the machine boots; built where it has to be."""
    built = subprocess.run(
        [PROJECT / "scripts" / "vm" / "image"], stdout=subprocess.PIPE, check=True, text=True
    )
    return Path(built.stdout.strip())


def _machine(directory: Path, disks: Sequence[Disk]) -> list[str]:
    built = image()
    # That /dev/kvm is there says little: in many virtual machines it breaks down in mid-boot.
    accelerator = os.environ.get("CHAINMERGE_VM_ACCEL", "tcg,thread=multi,tb-size=512")
    argv = [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-machine", "q35", "-accel", accelerator,
        "-cpu", "max,la57=off", "-smp", "2", "-m", "2G",
        "-kernel", str(built / "vmlinuz"), "-initrd", str(built / "initrd.img"),
        "-append", _KERNEL,
        "-device", "virtio-rng-pci", "-device", "virtio-serial-pci,max_ports=4",
        "-drive", f"file={built / 'root.img'},if=none,id=root,format=raw,readonly=on,cache=unsafe",
        "-device", "virtio-blk-pci,drive=root",
        "-fw_cfg", f"name=opt/rig/environment,file={directory / 'environment'}",
        "-fw_cfg", f"name=opt/rig/command,file={directory / 'command'}",
    ]  # fmt: skip
    for disk in disks:
        if not disk.file.exists():
            disk.file.touch()
            os.truncate(disk.file, disk.size)
        sectors = f"logical_block_size={disk.sector_size},physical_block_size={disk.sector_size}"
        argv += [
            "-drive",
            f"file={disk.file},if=none,id={disk.name},format=raw,cache=unsafe,discard=unmap",
            "-device",
            f"virtio-blk-pci,drive={disk.name},serial={disk.name},{sectors}",
        ]
    return argv


def _port(number: int, name: str, end: socket.socket) -> list[str]:
    return [
        "-chardev", f"socket,id={name},fd={end.fileno()}",
        "-device", f"virtserialport,chardev={name},nr={number},name={name}",
    ]  # fmt: skip


@contextmanager
def _shared_directory(scratch: Path) -> Iterator[list[str]]:
    """QEMU's arguments for a machine that sees the project's directory."""
    program = next((path for path in _VIRTIOFSD if path.exists()), None)
    if program is None:
        raise FileNotFoundError("virtiofsd")
    path = scratch / "share"
    # The newer one, written in Rust, has options of its own.
    options = (
        [f"--shared-dir={PROJECT}", "--cache=auto"]
        if program == _VIRTIOFSD[0]
        else ["-o", f"source={PROJECT}", "-o", "cache=auto", "-o", "no_posix_lock"]
    )
    with (scratch / "virtiofsd").open("wb") as log, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        daemon = subprocess.Popen(
            [program, f"--fd={listener.fileno()}", *options],
            pass_fds=(listener.fileno(),),
            stdout=log,
            stderr=log,
        )
    try:
        yield [
            "-object", "memory-backend-memfd,id=memory,size=2G,share=on",
            "-machine", "memory-backend=memory",
            "-chardev", f"socket,id=share,path={path}",
            "-device", "vhost-user-fs-pci,chardev=share,tag=share",
        ]  # fmt: skip
    finally:
        daemon.kill()
        daemon.wait()


def _read_lines(
    output: socket.socket, lines: list[str], printed: threading.Event, echo: IO[str] | None
) -> None:
    with output.makefile(errors="replace") as told:
        for line in told:
            lines.append(line.rstrip("\n"))
            printed.set()
            if echo is not None:
                echo.write(line)
                echo.flush()


def main() -> int:
    """Run a command in a machine of its own, with two scratch disks of 1 GiB."""
    with tempfile.TemporaryDirectory(prefix="chainmerge-vm-") as scratch:
        disks = [Disk(name, Path(scratch) / name, 1 << 30) for name in ("scratch0", "scratch1")]
        with booted(sys.argv[1:], disks, echo=sys.stdout) as machine:
            return machine.wait()


if __name__ == "__main__":
    sys.exit(main())
