# SPDX-License-Identifier: Apache-2.0
"""Logical volumes removed at the end of a live merge, once the VM has closed them."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge import live
from chainmerge.options import Access, LiveOptions, MergeOptions
from tests.support.live_vm import running_vm
from tests.support.lvm_images import Volumes, lvm_images
from tests.support.qemu import assert_clean, content, info

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

DEVICES = Access(allow_backing=("/dev",))
DELETE = LiveOptions(delete=True)
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Volumes]:
    with lvm_images(tmp_path, monkeypatch) as made:
        yield made


def three(volumes: Volumes) -> Sequence[Path]:
    paths = volumes.chain("base-0", "top-1", "leaf-2")
    volumes.show()
    return paths


@pytest.mark.parametrize("kind", ["internal", "active"])
def test_merged_volumes_are_removed(volumes: Volumes, tmp_path: Path, kind: str) -> None:
    base, top, leaf = three(volumes)
    expected = content(leaf)
    merged = leaf if kind == "active" else top
    with running_vm(tmp_path / "vm", [base, top, leaf]) as vm, vm.disk() as disk:
        report = live.merge(disk, merged, base, access=DEVICES, options=DELETE)
        unexpected = [one for one in report.warnings if "goes on writing" not in one]
        assert not unexpected
        again = live.merge(disk, merged, base, access=DEVICES, options=DELETE)
        assert again.outcome == "already-merged"
        vm.quit()
    gone = {"active": ["leaf-2", "top-1"], "internal": ["top-1"]}[kind]
    assert report.deleted == tuple(str(volumes.path(name)) for name in gone)
    assert set(volumes.names()) == {"base-0", "leaf-2"} - set(gone)
    assert content(base if kind == "active" else leaf) == expected
    assert_clean(base)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_as_volumes_are_removed(volumes: Volumes, tmp_path: Path, moment: str) -> None:
    base, top, leaf = three(volumes)
    expected = content(leaf)
    if moment == "before":
        volumes.lvm.kill_before("lvremove")
    else:
        volumes.lvm.kill_after("lvremove")
    with running_vm(tmp_path / "vm", [base, top, leaf]) as vm:
        pid = os.fork()
        if pid == 0:
            try:
                with vm.disk() as disk:
                    live.merge(disk, leaf, base, access=DEVICES, options=DELETE)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status == -signal.SIGKILL
        volumes.lvm.mend("lvremove")
        vm.quit()
    # The VM has ended: the cold command finishes it.
    chainmerge.merge(leaf, base, DEVICES, MergeOptions(delete=True))
    assert volumes.names() == {"base-0": volumes.uuids["base-0"]}
    assert content(base) == expected
    assert_clean(base)


def test_what_somebody_else_has_open_is_left(volumes: Volumes, tmp_path: Path) -> None:
    base, top, leaf = three(volumes)
    expected = content(leaf)
    with (
        running_vm(tmp_path / "vm", [base, top, leaf]) as vm,
        vm.disk() as disk,
        top.open("rb"),
    ):
        report = live.merge(disk, top, base, access=DEVICES, options=DELETE)
        vm.quit()
    assert any("in use" in warning for warning in report.warnings)
    assert report.deleted == ()
    assert "top-1" in volumes.names()
    assert content(leaf) == expected


@pytest.mark.parametrize("kind", ["internal", "active"])
def test_volumes_that_were_pulled_up_are_removed(
    volumes: Volumes, tmp_path: Path, kind: str
) -> None:
    """Their backing names are relative, as Proxmox VE and oVirt have them."""
    paths = volumes.chain("root-0", "base-1", "top-2", *(["leaf-3"] if kind == "internal" else []))
    volumes.show()
    root, base, top = paths[:3]
    expected = content(paths[-1])
    options = LiveOptions(direction="pull", delete=True)
    with running_vm(tmp_path / "vm", paths) as vm, vm.disk() as disk:
        report = live.merge(disk, top, base, access=DEVICES, options=options)
        assert not [one for one in report.warnings if "goes on writing" not in one]
        again = live.merge(disk, top, base, access=DEVICES, options=options)
        assert again.outcome == "already-merged"
        vm.quit()
    assert report.deleted == (str(base),)
    assert base.name not in volumes.names()
    assert info(top)["backing-filename"] == root.name
    assert content(paths[-1]) == expected
    assert_clean(top)
