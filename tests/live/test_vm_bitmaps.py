# SPDX-License-Identifier: Apache-2.0
"""The bitmaps of all disks of a VM: of a real libvirt's, running or not, and of a real QEMU's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from xml.sax.saxutils import escape

import libvirt
import msgspec
import pytest

from chainmerge import live
from chainmerge.documents.bitmaps import BitmapsOfDisks, PruneOfDisks
from chainmerge.errors import ExitCode
from chainmerge.live.errors import NoSuchDomain, UnknownDomain
from tests.support.cli import chainmerge as command
from tests.support.live_scenario import build
from tests.support.live_vm import running_vm
from tests.support.qemu import bitmap_names, create, qemu_img

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from typing import Any

NAME: Final = "three-disks"


def described(disks: Mapping[str, Path], cd: Path) -> str:
    """A domain with these disks, by their targets, and a CD."""
    elements = "".join(
        f"<disk type='file' device='disk'><driver name='qemu' type='{image.suffix[1:]}'/>"
        f"<source file='{escape(str(image))}'/><target dev='{target}' bus='virtio'/></disk>"
        for target, image in disks.items()
    )
    return f"""
<domain type='qemu'>
  <name>{NAME}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    {elements}
    <disk type='file' device='cdrom'><driver name='qemu' type='raw'/>
      <source file='{escape(str(cd))}'/><target dev='sda' bus='sata'/><readonly/></disk>
    <controller type='usb' model='none'/><memballoon model='none'/>
  </devices>
</domain>"""


@pytest.fixture
def disks(tmp_path: Path) -> dict[str, Path]:
    """Two disks of two images each, ``stale`` in the base of the first, and a raw one."""
    found = {}
    for target in ("vda", "vdb"):
        base = create(tmp_path / f"{target}-base.qcow2", 1 << 20)
        found[target] = create(tmp_path / f"{target}.qcow2", backing=base)
    qemu_img("bitmap", "--add", tmp_path / "vda-base.qcow2", "stale")
    found["vdc"] = create(tmp_path / "vdc.raw", 1 << 20, fmt="raw")
    return found


@pytest.fixture
def domain(tmp_path: Path, uri: str, disks: dict[str, Path]) -> Iterator[Any]:
    """A domain that is defined, and does not run yet."""
    connection = libvirt.open(uri)
    found = connection.defineXML(described(disks, create(tmp_path / "cd.raw", 1 << 20, fmt="raw")))
    try:
        yield found
    finally:
        if found.isActive():
            found.destroy()
        found.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
        connection.close()


def checkpoint(domain: Any, name: str, *targets: str) -> None:
    """Have libvirt make a checkpoint of some disks."""
    names = {"vda": "no", "vdb": "no", "vdc": "no"} | dict.fromkeys(targets, "bitmap")
    elements = "".join(f"<disk name='{one}' checkpoint='{how}'/>" for one, how in names.items())
    domain.checkpointCreateXML(
        f"<domaincheckpoint><name>{name}</name><disks>{elements}</disks></domaincheckpoint>"
    )


def usable(uri: str) -> dict[str, bool]:
    """What the command says of each name."""
    ran = command("bitmaps", "list", "--json", "--domain", NAME, "--connect", uri)
    assert ran.status == 0, ran.err
    found = msgspec.json.decode(ran.out, type=BitmapsOfDisks)
    assert len(found.disks) == 2
    return {one.name: one.usable for one in found.checkpoints}


def test_which_checkpoints_a_backup_can_use(
    uri: str, domain: Any, disks: dict[str, Path], tmp_path: Path
) -> None:
    assert usable(uri) == {"stale": False}
    with pytest.raises(NoSuchDomain, match="it runs: none"):
        live.DomainDisk(NAME, "vda", uri)
    domain.create()
    checkpoint(domain, "all", "vda", "vdb")
    checkpoint(domain, "one", "vda")
    assert usable(uri) == {"all": True, "one": False, "stale": False}
    before = {path: path.read_bytes() for path in tmp_path.glob("*.qcow2")}
    refused = command("bitmaps", "prune", "--lock-wait", "0", "--domain", NAME, "--connect", uri)
    assert refused.status == ExitCode.REFUSED
    assert {path: path.read_bytes() for path in before} == before
    domain.destroyFlags(libvirt.VIR_DOMAIN_DESTROY_GRACEFUL)
    assert usable(uri) == {"all": True, "one": False, "stale": False}
    ran = command("bitmaps", "prune", "--json", "--domain", NAME, "--connect", uri)
    assert ran.status == 0, ran.err
    pruned = msgspec.json.decode(ran.out, type=PruneOfDisks)
    assert [[one.name for one in disk.removed] for disk in pruned.disks] == [["stale"], []]
    assert set(bitmap_names(disks["vda"])) == {"all", "one"}
    assert {one.name: one.usable for one in pruned.checkpoints} == {"all": True, "one": False}


def test_a_domain_that_there_is_not(uri: str, domain: Any) -> None:
    with pytest.raises(UnknownDomain, match=NAME):
        live.bitmaps_list_domain("another", uri)
    ran = command("bitmaps", "list", "--domain", "another", "--connect", uri)
    assert ran.status == ExitCode.USAGE


def test_a_running_vm_tells_what_it_has_in_memory(tmp_path: Path) -> None:
    scenario = build(tmp_path / "chain", 1, levels=1, active=True)
    with running_vm(tmp_path / "vm", scenario.images) as vm:
        ran = command("bitmaps", "list", "--json", "--qmp", vm.qmp)
        on_disk = command("bitmaps", "list", "--json", scenario.images[-1])
        vm.quit()
    assert ran.status == 0, ran.err
    found = msgspec.json.decode(ran.out, type=BitmapsOfDisks)
    (disk,) = found.disks
    assert disk.image == str(scenario.images[-1])
    assert {one.name: one.passes for one in disk.verdicts} == {
        "everywhere": True,
        "in-top": True,
        "stale-0": False,
        "stale-1": False,
        "stale-2": False,
    }
    # What is on disk meanwhile says that nothing can be used.
    assert not any(one["passes"] for one in on_disk.json["verdicts"])
    assert {one.name for one in found.checkpoints if one.usable} == {"everywhere", "in-top"}
