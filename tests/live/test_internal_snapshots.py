# SPDX-License-Identifier: Apache-2.0
"""Internal snapshots in the images of a running VM: left as they are, or the merge is refused."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chainmerge import live
from chainmerge.errors import ChainmergeError
from chainmerge.options import LiveOptions
from chainmerge.planning.errors import SnapshotsOfVmWouldChange
from tests.support.domain_vm import running_domain
from tests.support.live_scenario import DISK, LiveScenario, build
from tests.support.live_vm import DEVICE, running_vm
from tests.support.qemu import content, info, qemu_img, qemu_io

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.timeout(180)

Disk = live.QmpVm | live.DomainDisk


def shown(image: Path, snapshot: str) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "raw"
        qemu_img("convert", "-U", "-l", snapshot, "-O", "raw", image, raw)
        return raw.read_bytes()


@contextlib.contextmanager
def disk_of(
    port: str, directory: Path, scenario: LiveScenario, uri: Callable[[], str]
) -> Iterator[Disk]:
    if port == "qmp":
        with (
            running_vm(directory, scenario.images) as vm,
            live.QmpVm(str(vm.qmp), device=DEVICE) as disk,
        ):
            yield disk
    else:
        with running_domain(directory, uri(), scenario.images) as domain, domain.disk() as disk:
            yield disk


@pytest.fixture
def lazy_uri(request: pytest.FixtureRequest) -> Callable[[], str]:
    """libvirt's daemon, started for those who ask."""
    return lambda: str(request.getfixturevalue("uri"))


@pytest.mark.parametrize("port", ["qmp", "libvirt"])
@pytest.mark.parametrize("active", [True, False])
def test_a_snapshot_that_reads_from_below_refuses(
    tmp_path: Path, port: str, active: bool, lazy_uri: Callable[[], str]
) -> None:
    scenario = build(tmp_path / "chain", 3, levels=2, active=active)
    qemu_img("snapshot", "-c", "keep", scenario.merged[0])
    qemu_io(scenario.merged[0], f"write -q -P 9 0 {DISK}")
    with disk_of(port, tmp_path / "vm", scenario, lazy_uri) as disk:
        before = {path: path.read_bytes() for path in (scenario.base, *scenario.merged)}
        plan = live.plan(disk, scenario.top, scenario.base)
        assert "snapshots-would-change-live" in [one.code for one in plan.refusals]
        with pytest.raises(SnapshotsOfVmWouldChange) as refused:
            live.merge(disk, scenario.top, scenario.base)
        assert isinstance(refused.value, ChainmergeError)
        assert refused.value.image == str(scenario.merged[0])
        assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("port", ["qmp", "libvirt"])
@pytest.mark.parametrize("active", [True, False])
def test_snapshots_that_read_nothing_of_it_are_left(
    tmp_path: Path, port: str, active: bool, lazy_uri: Callable[[], str]
) -> None:
    scenario = build(tmp_path / "chain", 3, levels=1, active=active)
    qemu_img("snapshot", "-c", "below", scenario.base)
    qemu_io(scenario.top, f"write -q -P 9 0 {DISK}")
    qemu_img("snapshot", "-c", "whole", scenario.top)
    qemu_io(scenario.top, "write -q -P 10 0 1M")
    before = {
        (scenario.base, "below"): shown(scenario.base, "below"),
        (scenario.top, "whole"): shown(scenario.top, "whole"),
    }
    with disk_of(port, tmp_path / "vm", scenario, lazy_uri) as disk:
        live.merge(disk, scenario.top, scenario.base)
    for (path, name), view in before.items():
        assert shown(path, name) == view


def test_what_goes_with_its_image_refuses(tmp_path: Path) -> None:
    scenario = build(tmp_path / "chain", 3, levels=1, active=False)
    qemu_io(scenario.top, f"write -q -P 9 0 {DISK}")
    qemu_img("snapshot", "-c", "whole", scenario.top)
    view = content(scenario.top)
    with (
        running_vm(tmp_path / "vm", scenario.images) as vm,
        live.QmpVm(str(vm.qmp), device=DEVICE) as disk,
        pytest.raises(SnapshotsOfVmWouldChange),
    ):
        live.merge(disk, scenario.top, scenario.base, options=LiveOptions(delete=True))
    assert content(scenario.top) == view
    assert info(scenario.top)["snapshots"][0]["name"] == "whole"
