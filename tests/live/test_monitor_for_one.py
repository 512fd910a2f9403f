# SPDX-License-Identifier: Apache-2.0
"""A monitor serves one client at a time: others get in while data is copied."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from chainmerge import live
from chainmerge.live.qmp.monitor import Monitor
from chainmerge.options import LiveOptions
from tests.support.live_scenario import DISK, assert_closed_right, build
from tests.support.live_vm import DEVICE, Guest, running_vm

if TYPE_CHECKING:
    from pathlib import Path

    from chainmerge.documents.progress import ProgressEvent

pytestmark = pytest.mark.timeout(120)


class Manager:
    """Asks the VM something over the monitor that a merge uses, again and again."""

    def __init__(self, qmp: Path) -> None:
        self.served = 0
        self._qmp = qmp
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Ask no more."""
        self._is_over.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._is_over.is_set():
            with Monitor(str(self._qmp)) as monitor:
                assert monitor.execute("query-status")
            self.served += 1


@pytest.mark.parametrize("kind", ["internal", "active"])
def test_others_are_served_while_data_is_copied(tmp_path: Path, kind: str) -> None:
    scenario = build(tmp_path / "chain", 1, levels=1, active=kind == "active")
    with running_vm(tmp_path / "vm", scenario.images) as vm:
        manager = Manager(vm.qmp)
        seen: list[int] = []

        def observe(event: ProgressEvent) -> None:
            if event.stage == "copy" and not seen:
                manager.start()
            if seen or event.stage == "copy":
                seen.append(manager.served)

        # Slow enough to be met; a guest that writes has to be caught up with.
        bandwidth = 64 << 20 if scenario.is_active else 8 << 20
        options = LiveOptions(delete=True, bandwidth=bandwidth)
        with (
            Guest(vm, 1, DISK) as guest,
            live.QmpVm(str(vm.qmp), device=DEVICE, monitor_hold=0) as disk,
        ):
            live.merge(disk, scenario.top, scenario.base, options=options, on_progress=observe)
        manager.stop()
        assert seen[-1] > 0
        vm.quit()
    assert_closed_right(scenario, guest)
