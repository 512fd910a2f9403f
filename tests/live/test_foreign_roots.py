# SPDX-License-Identifier: Apache-2.0
"""Merges in a running VM whose disk stands on an image of another format."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from chainmerge import live
from chainmerge.options import LiveOptions
from chainmerge.planning.errors import BaseForeign
from tests.support.domain_vm import running_domain
from tests.support.foreign import DISK, FEW_KINDS, Kind, foreign_image
from tests.support.live_vm import DEVICE, running_vm
from tests.support.qemu import assert_clean, content, create, info, qemu_io

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


def standing_on(kind: Kind) -> Callable[[Sequence[Path]], list[str]]:
    """Command line: the lowest image is of that format."""

    def command_line(images: Sequence[Path]) -> list[str]:
        options: list[str] = []
        for index, image in enumerate(images):
            node: dict[str, object] = {
                "driver": "qcow2" if index else kind.format,
                "node-name": f"i{index}",
                "read-only": image != images[-1],
                "file": {"driver": "file", "filename": str(image), "auto-read-only": True},
            }
            if index:
                node["backing"] = f"i{index - 1}"
            options += ["-blockdev", json.dumps(node)]
        device = f"virtio-blk-pci,id={DEVICE},drive=i{len(images) - 1},share-rw=on"
        return [*options, "-device", device]

    return command_line


@pytest.mark.parametrize("is_active", [False, True], ids=["internal", "active"])
@pytest.mark.parametrize("kind", FEW_KINDS, ids=lambda kind: kind.name)
def test_images_above_are_merged(tmp_path: Path, kind: Kind, is_active: bool) -> None:
    root = foreign_image(tmp_path, kind)
    lower = create(tmp_path / "lower.qcow2", backing=root, backing_format=kind.format)
    top = create(tmp_path / "top.qcow2", backing=lower, cluster_size=4096)
    qemu_io(lower, "write -q -P 0x44 512k 128k")
    qemu_io(top, "write -q -P 0x55 4k 4k", "write -q -P 0x56 3M 8k")
    images = [root, lower, top]
    if not is_active:
        images.append(create(tmp_path / "leaf.qcow2", backing=top))
    before = content(images[-1])
    with running_vm(tmp_path / "vm", images, standing_on(kind)) as vm:
        with vm.guest(1, DISK) as guest, vm.disk() as disk:
            assert live.plan(disk, top).feasible
            live.merge(disk, top, options=LiveOptions(delete=True))
        with vm.disk() as disk, pytest.raises(BaseForeign):
            live.merge(disk, lower)
        vm.quit()
    result = lower if is_active else images[-1]
    assert content(result) == guest.applied_to(before)
    assert_clean(result)
    assert info(lower)["backing-filename-format"] == kind.format
    assert not top.exists()


@pytest.mark.parametrize("kind", FEW_KINDS[::2], ids=lambda kind: kind.name)
def test_in_a_domain_of_libvirt(tmp_path: Path, uri: str, kind: Kind) -> None:
    root = foreign_image(tmp_path, kind)
    lower = create(tmp_path / "lower.qcow2", backing=root, backing_format=kind.format)
    top = create(tmp_path / "top.qcow2", backing=lower, cluster_size=4096)
    qemu_io(top, "write -q -P 0x55 4k 4k", "write -q -P 0x56 3M 8k")
    leaf = create(tmp_path / "leaf.qcow2", backing=top)
    before = content(leaf)
    with running_domain(tmp_path / "vm", uri, [root, lower, top, leaf]) as vm:
        with vm.guest(1, DISK) as guest, vm.disk() as disk:
            live.merge(disk, top, options=LiveOptions(delete=True))
        vm.quit()
    assert content(leaf) == guest.applied_to(before)
    assert info(lower)["backing-filename-format"] == kind.format
