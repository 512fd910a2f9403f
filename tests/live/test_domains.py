# SPDX-License-Identifier: Apache-2.0
"""The disks of all domains of a real libvirt, and which images none of them has."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import libvirt
import pytest

import chainmerge
from chainmerge import DefinedDisk, ScanOptions
from chainmerge.live.errors import VmUnreachable
from tests.inventory.findings.building import chain
from tests.support.cli import chainmerge as command
from tests.support.domain_vm import TARGET, running_domain
from tests.support.libvirtd import libvirtd
from tests.support.qemu import qemu_img

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(180)

IDLE = """\
<domain type='qemu'><name>idle</name><memory>65536</memory><os><type>hvm</type></os><devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
<source file='{image}'/><target dev='vda'/></disk>
<disk type='network' device='disk'><driver name='qemu' type='raw'/>
<source protocol='nbd' name='x'><host name='nowhere'/></source><target dev='vdb'/></disk>
<disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>
</devices></domain>"""


def test_running_and_idle_domains(tmp_path: Path) -> None:
    home = tmp_path / "images"
    home.mkdir()
    running, idle = chain(home, "running", 2), chain(home, "idle", 2)
    unused = chain(home, "unused", 1)[0]
    for image in running:
        # While the VM runs, that of the active image is marked as in use.
        qemu_img("bitmap", "--add", image, "daily")
        os.utime(image)
    with (
        libvirtd(tmp_path / "libvirt") as uri,
        running_domain(tmp_path / "vm", uri, running) as domain,
    ):
        connection = libvirt.open(uri)
        connection.defineXML(IDLE.format(image=idle[-1]))
        disks = chainmerge.domain_disks(uri)
        assert set(disks) == {
            DefinedDisk(domain.name, TARGET, str(running[-1]), True),
            DefinedDisk("idle", "vda", str(idle[-1]), False),
        }
        report = chainmerge.scan([home], options=ScanOptions(cache=False), domains=disks)
        assert [(one.code, one.image) for one in report.findings] == [("unused-image", str(unused))]
        assert qemu_img("info", "-U", running[-1]).count("in-use") == 1
        by_path = {image.path: image for image in report.images}
        assert by_path[str(running[-1])].may_be_stale
        assert not by_path[str(idle[-1])].may_be_stale
        ran = command("scan", "--domains", "--connect", uri, "--no-cache", "-q", "--json")
        shown = [image["path"] for image in ran.json["images"]]
        assert shown == sorted(map(str, (*running, *idle)))
        connection.close()


def test_a_libvirt_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(VmUnreachable):
        chainmerge.domain_disks(f"qemu+unix:///system?socket={tmp_path}/missing")
