# SPDX-License-Identifier: Apache-2.0
"""Merges in a running VM, done by its own QEMU; see docs/live-merge.md.

>>> from chainmerge import live
>>> with live.QmpVm("/run/vm/qmp", device="disk0") as vm:     # doctest: +SKIP
...     report = live.merge(vm, "/images/snap1.qcow2")
>>> with live.DomainDisk("web", "vda") as disk:               # doctest: +SKIP
...     report = live.merge(disk, "/images/snap1.qcow2")

Several disks are merged as one operation:

>>> with live.QmpMachine("/run/vm/qmp") as machine:           # doctest: +SKIP
...     report = live.merge_all_disks(machine)

Another way to reach a VM is another class with the methods of :class:`LiveVm`.
"""

from __future__ import annotations

from chainmerge.live import disks, merging, vm_bitmaps, whole_vm
from chainmerge.live.driving import LiveDisk
from chainmerge.live.libvirt.connection import DEFAULT_URI
from chainmerge.live.libvirt.disk import DomainDisk
from chainmerge.live.libvirt.machine import Domain
from chainmerge.live.port import LiveVm
from chainmerge.live.qmp import repairing
from chainmerge.live.qmp.machine import QmpMachine
from chainmerge.live.qmp.vm import DEFAULT_HOLD_SECONDS, QmpVm
from chainmerge.options import LiveOptions
from chainmerge.storage.boundary import at_the_boundary

bitmaps_list_domain = at_the_boundary(vm_bitmaps.list_bitmaps_of_domain)
bitmaps_list_vm = at_the_boundary(vm_bitmaps.list_bitmaps_of_vm)
prune_domain = at_the_boundary(vm_bitmaps.prune_disks_of_domain)
merge = at_the_boundary(merging.merge)
plan = at_the_boundary(merging.plan)
merge_all_disks = at_the_boundary(whole_vm.merge_all_disks)
merge_disks = at_the_boundary(disks.merge_disks)
plan_all_disks = at_the_boundary(whole_vm.plan_all_disks)
plan_disks = at_the_boundary(disks.plan_disks)
plan_repair = at_the_boundary(repairing.plan_repair)
repair = at_the_boundary(repairing.repair)
resume = at_the_boundary(merging.resume)
status = at_the_boundary(merging.status)

__all__ = [
    "DEFAULT_HOLD_SECONDS",
    "DEFAULT_URI",
    "Domain",
    "DomainDisk",
    "LiveDisk",
    "LiveOptions",
    "LiveVm",
    "QmpMachine",
    "QmpVm",
    "bitmaps_list_domain",
    "bitmaps_list_vm",
    "merge",
    "merge_all_disks",
    "merge_disks",
    "plan",
    "plan_all_disks",
    "plan_disks",
    "plan_repair",
    "prune_domain",
    "repair",
    "resume",
    "status",
]
