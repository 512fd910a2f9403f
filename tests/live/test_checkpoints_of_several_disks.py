# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of libvirt's is one of several disks: merging one leaves it to the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import libvirt
import pytest

from chainmerge import live
from chainmerge.live.errors import LiveMergeFailed, VmRefused
from chainmerge.options import LiveOptions
from tests.support.domain_vm import DiskOfGuest, TestDomain, disk_described, running_domain_with
from tests.support.live_scenario import MIB, leftovers_in
from tests.support.qemu import create

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(180)

NAME = "checkpoint"
DELETE = LiveOptions(delete=True)


class Killed(BaseException):
    """Nothing is done about it, as about a signal that ends the process."""


class TwoDisks:
    """A domain with a checkpoint of two disks, the first of which has a snapshot since."""

    def __init__(self, vm: TestDomain, directory: Path) -> None:
        self.vm = vm
        self.directory = directory
        self.top = directory / "top.qcow2"
        self._create("domaincheckpoint", "checkpoint='bitmap'", "checkpoint='bitmap'")
        self._create(
            "domainsnapshot", f"snapshot='external'><source file='{self.top}'/", "snapshot='no'"
        )

    def _create(self, kind: str, of_first: str, of_second: str) -> None:
        end = "</disk>" if "<source" in of_first else ""
        slash = "" if end else "/"
        described = (
            f"<{kind}><name>{NAME}</name><disks><disk name='vda' {of_first}{slash}>{end}"
            f"<disk name='vdb' {of_second}/></disks></{kind}>"
        )
        if kind == "domaincheckpoint":
            self.vm.domain.checkpointCreateXML(described)
        else:
            flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
            flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
            self.vm.domain.snapshotCreateXML(described, flags)

    def disk(self) -> DiskOfGuest:
        return DiskOfGuest(self.vm.directory, self.vm.name, self.vm.uri)

    def lose_bitmap_of(self, image: str) -> None:
        """Have the bitmap go behind libvirt's back."""
        nodes = self.vm.execute("query-named-block-nodes", flat=True)
        (node,) = (
            one["node-name"]
            for one in nodes
            if one["file"].endswith(f"/{image}") and one["drv"] == "qcow2"
        )
        self.vm.execute("block-dirty-bitmap-remove", node=node, name=NAME)

    def back_up(self, wanted: str) -> None:
        """Have libvirt write an increment of one disk since the checkpoint."""
        disks = "".join(
            f"<disk name='{target}' type='file'><target file='{self.directory}/{target}.backup'/>"
            "<driver type='qcow2'/></disk>"
            if target == wanted
            else f"<disk name='{target}' backup='no'/>"
            for target in ("vda", "vdb")
        )
        self.vm.domain.backupBegin(
            f"<domainbackup mode='push'><incremental>{NAME}</incremental>"
            f"<disks>{disks}</disks></domainbackup>",
            None,
        )

    def described(self) -> str:
        return str(self.vm.domain.checkpointLookupByName(NAME).getXMLDesc())


@pytest.fixture
def two(tmp_path: Path, uri: str) -> Iterator[TwoDisks]:
    images = [create(tmp_path / name, 8 * MIB) for name in ("first.qcow2", "second.qcow2")]
    described = [disk_described(*pair) for pair in zip(("vda", "vdb"), images, strict=True)]
    with running_domain_with(tmp_path / "vm", uri, described) as vm:
        yield TwoDisks(vm, tmp_path)


def test_what_is_stale_on_one_disk_alone_is_left_to_the_other(two: TwoDisks) -> None:
    two.lose_bitmap_of("top.qcow2")
    with two.disk() as disk:
        live.merge(disk, two.top, options=DELETE)
        assert NAME not in disk.known_names()
    two.back_up("vdb")


def test_what_is_broken_on_another_disk_is_kept_here(two: TwoDisks) -> None:
    two.lose_bitmap_of("second.qcow2")
    before = two.described()
    with two.disk() as disk:
        report = live.merge(disk, two.top, options=DELETE)
    assert [bitmap.name for bitmap in report.bitmaps] == [NAME]
    assert two.described() == before
    two.back_up("vda")


def test_a_manager_that_was_killed_in_between_is_run_again(
    two: TwoDisks, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.lose_bitmap_of("top.qcow2")
    remove = live.DomainDisk.remove_everywhere

    def remove_and_die(disk: live.DomainDisk, name: str) -> None:
        remove(disk, name)
        raise Killed

    with two.disk() as disk:
        monkeypatch.setattr(live.DomainDisk, "remove_everywhere", remove_and_die)
        with pytest.raises(Killed):
            live.merge(disk, two.top, options=DELETE)
        monkeypatch.undo()
        live.merge(disk, two.top, options=DELETE)
    assert leftovers_in(two.directory) == []
    two.back_up("vdb")


def test_what_libvirt_does_not_take_at_once_is_not_forgotten(
    two: TwoDisks, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.lose_bitmap_of("top.qcow2")

    def refuse(disk: live.DomainDisk, described: str) -> None:
        raise VmRefused(disk.name, "virDomainCheckpointCreateXML", "another job has the domain")

    with two.disk() as disk:
        with monkeypatch.context() as patched:
            patched.setattr(live.DomainDisk, "define_checkpoint", refuse)
            with pytest.raises(VmRefused, match="another job"):
                live.merge(disk, two.top, options=DELETE)
        with pytest.raises(LiveMergeFailed):
            live.resume(disk)
    assert leftovers_in(two.directory) == []
    two.back_up("vdb")


def test_a_checkpoint_is_none_of_disks_that_are_gone(two: TwoDisks) -> None:
    one_is_gone = two.described().replace("'vdb' checkpoint", "'gone' checkpoint")
    with two.disk() as disk:
        disk.define_checkpoint_again(one_is_gone)
        assert "gone" not in two.described()
        disk.define_checkpoint_again(one_is_gone.replace("'vda' checkpoint", "'lost' checkpoint"))
    two.back_up("vda")
