# SPDX-License-Identifier: Apache-2.0
"""How a running VM is reached, by the command lines that programs start QEMU with."""

from __future__ import annotations

import os

import pytest

from chainmerge.storage.qemu_command_line import live_merge_by, way_into

LIBVIRT = (
    "-name guest=web,debug-threads=on -no-user-config -nodefaults "
    "-chardev socket,id=charmonitor,fd=26,server=on,wait=off "
    "-mon chardev=charmonitor,id=monitor,mode=control "
    "-device virtio-blk-pci,drive=a,id=virtio-disk0"
)
PROXMOX = (
    "-id 100 -name db,debug-threads=on "
    "-chardev socket,id=qmp,path=/var/run/qemu-server/100.qmp,server=on,wait=off "
    "-mon chardev=qmp,mode=control -chardev socket,id=qmp-event,path=/var/run/qmeventd.sock "
    "-device scsi-hd,bus=s,drive=drive-scsi0,id=scsi0 -device virtio-net-pci,id=net0"
)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (LIBVIRT, "--domain web --disk TARGET"),
        (PROXMOX, "--qmp /var/run/qemu-server/100.qmp --device scsi0"),
        ("-qmp unix:/run/a,,b,server=on", "--qmp /run/a,b --device DEVICE"),
        (
            "-qmp unix:/run/q -device scsi-hd,drive=a,id=a -device scsi-hd,drive=b,id=b",
            "--qmp /run/q --device DEVICE",
        ),
        ("-qmp tcp:localhost:4444", ""),
        ("-chardev socket,id=q,fd=3 -mon chardev=q,mode=control", ""),
        ("-chardev socket,id=q,path=/run/hmp -mon chardev=q,mode=readline", ""),
        ("-name web -f qcow2", ""),
        ("-name", ""),
        ("", ""),
    ],
)
def test_what_leads_to_the_vm(arguments: str, options: str) -> None:
    assert way_into(["qemu-system-x86_64", *arguments.split()]) == options


def test_other_processes_are_no_vms() -> None:
    assert live_merge_by(os.getpid()) == ""
    assert live_merge_by(1 << 30) == ""
