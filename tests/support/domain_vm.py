# SPDX-License-Identifier: Apache-2.0
"""A domain of a real libvirt with a disk and without a guest system; see ``live_vm``."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import re
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

import libvirt
import libvirt_qemu

from chainmerge import live
from chainmerge.options import LiveOptions
from tests.support.dying import Moment, kill_ourselves
from tests.support.live_scenario import DISK
from tests.support.live_vm import Guest
from tests.support.nbd import NbdClient
from tests.support.qemu import content, qemu_img

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator, Sequence

TARGET: Final = "vda"
_numbers = itertools.count()


@dataclass
class TestDomain:
    """A running domain; what a guest would write comes in by an NBD export of its disk.

    The monitor is talked to by the test alone: it stands for the guest's processor.
    """

    __test__ = False

    directory: Path
    uri: str
    connection: Any
    domain: Any

    @property
    def name(self) -> str:
        return str(self.domain.name())

    @property
    def arguments(self) -> tuple[str, ...]:
        """The options of ``chainmerge live`` that lead to the disk."""
        return ("--domain", self.name, "--disk", TARGET, "--connect", self.uri)

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command; underscores in the names of arguments become dashes."""
        plain = {name.replace("_", "-"): value for name, value in arguments.items()}
        text = json.dumps({"execute": command, "arguments": plain})
        answer = json.loads(libvirt_qemu.qemuMonitorCommand(self.domain, text, 0))
        assert "error" not in answer, answer
        return answer["return"]

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
        address = {"type": "unix", "data": {"path": str(self.nbd)}}
        self.execute("nbd-server-start", addr=address)

    @property
    def nbd(self) -> Path:
        return self.directory / f"{self.name}.nbd"

    def client(self) -> NbdClient:
        """A connection to the guest's disk."""
        return NbdClient(self.nbd, "disk")

    def checkpoint(self, name: str) -> None:
        """Have libvirt make a checkpoint now."""
        self.domain.checkpointCreateXML(
            f"<domaincheckpoint><name>{escape(name)}</name><disks>"
            f"<disk name='{TARGET}' checkpoint='bitmap'/></disks></domaincheckpoint>"
        )

    def checkpoints(self) -> set[str]:
        return {each.getName() for each in self.domain.listAllCheckpoints()}

    def snapshot(self, path: Path) -> None:
        """Have libvirt put a new overlay on top of the disk."""
        self.domain.snapshotCreateXML(
            f"<domainsnapshot><name>{escape(path.name)}</name><disks>"
            f"<disk name='{TARGET}' snapshot='external'><source file='{escape(str(path))}'/></disk>"
            "</disks></domainsnapshot>",
            libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
            | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA,
        )

    def backup(self, target: Path, *, checkpoint: str, since: str | None = None) -> None:
        """Have libvirt write a backup and make a checkpoint; returns when it is done."""
        increment = "" if since is None else f"<incremental>{escape(since)}</incremental>"
        self.domain.backupBegin(
            f"<domainbackup mode='push'>{increment}<disks>"
            f"<disk name='{TARGET}' type='file'><target file='{escape(str(target))}'/>"
            "<driver type='qcow2'/></disk></disks></domainbackup>",
            f"<domaincheckpoint><name>{escape(checkpoint)}</name></domaincheckpoint>",
        )
        self._wait_for_job()

    def _wait_for_job(self) -> None:
        # libvirt answers with the type 0 once no job runs.
        nap = threading.Event()
        while self.domain.jobStats()["type"] != libvirt.VIR_DOMAIN_JOB_NONE:
            nap.wait(0.05)

    def restored(self, full: Path, increment: Path) -> bytes:
        """What an increment over a full backup holds."""
        qemu_img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", full, increment)
        return content(increment)

    @property
    def alive(self) -> bool:
        try:
            return bool(self.domain.isActive())
        except libvirt.libvirtError:
            return False

    def is_suspended(self) -> bool:
        return bool(self.domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED)

    def disk(self) -> DiskOfGuest:
        """The domain's disk, for a merge."""
        return DiskOfGuest(self.directory, self.name, self.uri)

    def guest(self, seed: int, disk_size: int = DISK, *, flushes: bool = False) -> DomainGuest:
        """Somebody who writes to the disk."""
        return DomainGuest(self, seed, disk_size, flushes=flushes)  # type: ignore[arg-type]

    def write_on(self, client: NbdClient, offset: int, data: bytes) -> None:
        """Have the guest write, once it runs."""
        nap = threading.Event()
        while True:
            with processor(self.directory):
                if not self.is_suspended():
                    client.write(offset, data)
                    return
            nap.wait(0.05)

    def chain(self) -> list[str]:
        """The names of the files of the disk's chain, the active one first."""
        root = ET.fromstring(self.domain.XMLDesc())
        (layer,) = (one for one in root.iter("disk") if one.find("target") is not None)
        names = []
        found: ET.Element | None = layer
        while found is not None and (source := found.find("source")) is not None:
            names.append(Path(source.get("file") or source.get("dev") or "").name)
            found = found.find("backingStore")
        return names

    def jobs(self) -> list[str]:
        """A word for the block job that there may be."""
        return ["running"] if self.domain.blockJobInfo(TARGET) else []

    @contextlib.contextmanager
    def exported(self) -> Iterator[NbdClient]:
        """A guest for a while. A QEMU has one NBD server, and backups need it too."""
        self.export()
        try:
            with self.client() as guest:
                yield guest
        finally:
            self.execute("nbd-server-stop")

    def forget_backing_store(self) -> None:
        """Have libvirt find out again what the disk stands on: a snapshot has written that down."""
        root = ET.fromstring(self.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
        for disk in root.iter("disk"):
            for known in disk.findall("backingStore"):
                disk.remove(known)
        self.connection.defineXML(ET.tostring(root, encoding="unicode"))

    def kill(self) -> None:
        """As a crash of the machine, as far as its memory goes."""
        self.domain.destroy()

    def quit(self) -> None:
        """An orderly end: images are closed, bitmaps stored."""
        self.domain.destroyFlags(libvirt.VIR_DOMAIN_DESTROY_GRACEFUL)


@contextlib.contextmanager
def processor(directory: Path) -> Iterator[None]:
    """For a request of the guest's, or for stopping it: never both at once."""
    with (directory / "processor").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class DomainGuest(Guest):
    """A guest that does nothing while its domain is suspended, as one with a processor would."""

    vm: TestDomain  # type: ignore[assignment]

    def _write_once(self, disk: NbdClient, random_: random.Random) -> None:
        with processor(self.vm.directory):
            if self.vm.is_suspended():
                return
            super()._write_once(disk, random_)


class DiskOfGuest(live.DomainDisk):
    """Suspends the writer of the test with the domain's own processor."""

    def __init__(self, vm_directory: Path, domain: str, uri: str, target: str = TARGET) -> None:
        super().__init__(domain, target, uri)
        self._vm_directory = vm_directory

    def suspend(self) -> None:
        with processor(self._vm_directory):
            super().suspend()


@contextlib.contextmanager
def running_domain(directory: Path, uri: str, images: Sequence[Path]) -> Iterator[TestDomain]:
    """A domain whose disk is the chain *images*, root first; it is destroyed at the end."""
    with running_domain_with(directory, uri, [disk_described(TARGET, images[-1])]) as vm:
        vm.export()
        yield vm


@contextlib.contextmanager
def running_domain_with(directory: Path, uri: str, disks: Sequence[str]) -> Iterator[TestDomain]:
    """A domain with disks as libvirt has them described; it is destroyed at the end."""
    directory.mkdir(parents=True, exist_ok=True)
    connection = libvirt.open(uri)
    try:
        domain = connection.createXML(_described(f"vm{next(_numbers)}", disks))
        vm = TestDomain(directory, uri, connection, domain)
        try:
            yield vm
        finally:
            if vm.alive:
                vm.kill()
    finally:
        connection.close()


@contextlib.contextmanager
def defined_domain(directory: Path, uri: str, images: Sequence[Path]) -> Iterator[TestDomain]:
    """The same without a guest, known to libvirt also while it does not run, as are checkpoints."""
    directory.mkdir(parents=True, exist_ok=True)
    connection = libvirt.open(uri)
    try:
        domain = connection.defineXML(
            _described(f"vm{next(_numbers)}", [disk_described(TARGET, images[-1])])
        )
        vm = TestDomain(directory, uri, connection, domain)
        try:
            domain.create()
            yield vm
        finally:
            if vm.alive:
                vm.kill()
            domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
    finally:
        connection.close()


def disk_described(target: str, image: Path) -> str:
    """A disk with that target, which another writer may write to as well."""
    kind, attribute = ("block", "dev") if image.is_block_device() else ("file", "file")
    return f"""
    <disk type='{kind}' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap'/>
      <source {attribute}='{escape(str(image))}'/>
      <target dev='{target}' bus='virtio'/>
      <alias name='{alias_of(target)}'/>
    </disk>"""


def alias_of(target: str) -> str:
    """What QEMU calls the device of a disk."""
    return f"ua-{target}"


def _described(name: str, disks: Sequence[str]) -> str:
    described = "".join(disks)
    shared = "".join(
        f"""
    <qemu:device alias='{alias}'><qemu:frontend>
      <qemu:property name='share-rw' type='bool' value='true'/>
    </qemu:frontend></qemu:device>"""
        for alias in re.findall(r"<alias name='([^']+)'", described)
    )
    return f"""
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <on_poweroff>destroy</on_poweroff>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    {described}
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
  <qemu:override>
{shared}
  </qemu:override>
</domain>"""


def let_die(
    disk: live.DomainDisk,
    call: int,
    moment: Moment,
    die: Callable[[], None],
    numbers: Iterator[int] | None = None,
) -> None:
    """Have *die* called before or after the public call to *disk* with the number *call*.

    Several disks may share the *numbers* of their calls.
    """
    numbers = numbers or itertools.count(1)

    def watched(passed_on: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            fatal = next(numbers) == call
            if fatal and moment == "before":
                die()
            result = passed_on(*args, **kwargs)
            if fatal and moment == "after":
                die()
            return result

        return called

    for name, method in vars(live.DomainDisk).items():
        if callable(method) and not name.startswith("_"):
            setattr(disk, name, watched(getattr(disk, name)))


def main() -> None:
    """A manager that kills itself at a call, as that of :mod:`tests.support.dying`."""
    directory, uri, domain, top, base, call, moment, direction = sys.argv[1:]
    with DiskOfGuest(Path(directory), domain, uri) as disk:
        let_die(disk, int(call), cast("Moment", moment), kill_ourselves)
        options = LiveOptions(
            delete=True, bandwidth=64 << 20, direction="pull" if direction == "pull" else "commit"
        )
        live.merge(disk, top, base, options=options)


if __name__ == "__main__":
    main()
