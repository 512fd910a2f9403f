# SPDX-License-Identifier: Apache-2.0
"""A merge in a running VM leaves a line of its own kind, and its plan is foretold from those."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from chainmerge import LiveOptions, live
from chainmerge.records.history import add_merge, merges_like
from chainmerge.storage.storage_names import storage_name
from tests.inventory.findings.building import chain
from tests.support.live_vm import DEVICE, running_vm

if TYPE_CHECKING:
    from pathlib import Path


def test_what_a_live_merge_leaves_and_foretells(tmp_path: Path) -> None:
    images = chain(tmp_path, "disk", 3)
    storage = storage_name(tmp_path)
    assert storage is not None
    with running_vm(tmp_path / "vm", images) as vm:
        with live.QmpVm(str(vm.qmp), device=DEVICE) as disk:
            planned = live.plan(disk, images[1])
            assert planned.prediction is not None
            assert (planned.prediction.storage, planned.prediction.merges) == (storage, 0)
            report = live.merge(disk, images[1])
            (line,) = merges_like(storage, "qemu", "full", live=True)
            assert (line.outcome, line.seconds) == ("merged", report.seconds)
            assert line.bytes_copied == planned.bytes_copied > 0
            assert merges_like(storage, "qemu", "full", live=False) == ()
            for _ in range(4):
                add_merge(replace(line, seconds=7.0))
            foretold = live.plan(disk, images[2]).prediction
            assert foretold is not None
            assert foretold.merges == 5
            assert foretold.seconds is not None
            assert live.plan(disk, images[2], options=LiveOptions(history=False)).prediction is None
        vm.quit()
