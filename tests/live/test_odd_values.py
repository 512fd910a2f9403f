# SPDX-License-Identifier: Apache-2.0
"""Odd values, odd callers: errors of ours, before anything is looked at."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from chainmerge import live
from chainmerge.errors import ChainmergeError, ExitCode, Misuse, Refused
from chainmerge.live.errors import VmUnreachable
from chainmerge.options import LiveOptions
from tests.support.cli import chainmerge as command
from tests.support.domain_vm import running_domain
from tests.support.live_scenario import LiveScenario, build
from tests.support.live_vm import DEVICE, running_vm

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(120)

NAN, INFINITE = float("nan"), float("inf")
ODD_OPTIONS = [
    {"bandwidth": 0},
    {"bandwidth": -1},
    {"bandwidth": 1.5},
    {"deadline": NAN},
    {"deadline": INFINITE},
    {"deadline": -1.0},
    {"deadline": "soon"},
    {"on_stall": "nonsense"},
    {"verify": "no"},
    {"volume": "tape"},
    {"size_limit": 0},
    {"delete": "no"},
    {"drop_bitmaps": 1},
]
ODD_TEXTS = ["", "\0", "a\0b", "a\0/b", "\udcff", "x" * 5000, "../..", "/"]


@pytest.mark.parametrize("odd", ODD_OPTIONS, ids=str)
def test_options(odd: dict[str, object]) -> None:
    with pytest.raises(Misuse) as raised:
        LiveOptions(**odd)  # type: ignore[arg-type]
    assert raised.value.code == "option-unusable"


@pytest.mark.parametrize(
    "odd", ["--bandwidth=0", "--deadline=nan", "--deadline=inf", "--deadline=-1", "--size-limit=0"]
)
def test_options_of_the_command(tmp_path: Path, odd: str) -> None:
    for verb in ("plan", "merge"):
        ran = command("live", verb, odd, "--qmp", tmp_path, "--device", "x", tmp_path / "top")
        assert ran.status == ExitCode.USAGE, ran


@pytest.mark.parametrize("odd", ODD_TEXTS)
def test_sockets(odd: str) -> None:
    with pytest.raises(ChainmergeError):
        live.QmpVm(odd, device=DEVICE)


@pytest.mark.parametrize("odd", ODD_TEXTS)
def test_names_of_domains(uri: str, odd: str) -> None:
    for domain, disk in ((odd, "vda"), ("none", odd)):
        with pytest.raises(ChainmergeError):
            live.DomainDisk(domain, disk, uri)


@pytest.mark.parametrize("odd", [*ODD_TEXTS, "qemu+unix:///nothing?socket=/nothing", "https://x"])
def test_names_of_libvirts(odd: str) -> None:
    if odd:
        with pytest.raises(VmUnreachable):
            live.DomainDisk("none", "vda", odd)


@pytest.fixture
def scenario(tmp_path: Path) -> LiveScenario:
    return build(tmp_path / "chain", 3, levels=1, active=False)


@pytest.mark.parametrize("odd", ODD_TEXTS)
def test_names_of_disks_and_images(tmp_path: Path, scenario: LiveScenario, odd: str) -> None:
    with running_vm(tmp_path / "vm", scenario.images) as vm:
        with pytest.raises(ChainmergeError):
            live.QmpVm(str(vm.qmp), device=odd)
        with pytest.raises(ChainmergeError):
            live.QmpVm(str(vm.qmp), node=odd)
        with vm.disk() as disk:
            for call in (live.plan, live.merge):
                for top, base in ((odd, None), (scenario.top, odd)):
                    with pytest.raises((Misuse, Refused)):
                        call(disk, top, base)


@pytest.mark.parametrize("odd", ODD_TEXTS)
def test_names_of_disks_of_a_domain(
    tmp_path: Path, uri: str, scenario: LiveScenario, odd: str
) -> None:
    with (
        running_domain(tmp_path / "vm", uri, scenario.images) as vm,
        pytest.raises(ChainmergeError),
    ):
        live.DomainDisk(vm.name, odd, uri)


def test_a_domain_that_is_gone_meanwhile(tmp_path: Path, uri: str, scenario: LiveScenario) -> None:
    with running_domain(tmp_path / "vm", uri, scenario.images) as vm, vm.disk() as disk:
        vm.kill()
        for call in (live.status, live.resume):
            with pytest.raises(VmUnreachable):
                call(disk)
        with pytest.raises(VmUnreachable):
            live.merge(disk, scenario.top)


def test_a_vm_that_is_gone_meanwhile(tmp_path: Path, scenario: LiveScenario) -> None:
    with running_vm(tmp_path / "vm", scenario.images) as vm, vm.disk() as disk:
        vm.kill()
        for call in (live.status, live.resume):
            with pytest.raises(VmUnreachable):
                call(disk)


def test_a_caller_in_an_event_loop(tmp_path: Path, uri: str, scenario: LiveScenario) -> None:
    async def merge(disk: live.LiveDisk) -> str:
        return str(live.merge(disk, scenario.top, options=LiveOptions(delete=True)).outcome)

    async def by_qmp() -> str:
        with running_vm(tmp_path / "vm", scenario.images) as vm, vm.disk() as disk:
            return await merge(disk)

    assert asyncio.run(by_qmp()) == "merged"
    other = build(tmp_path / "other", 3, levels=1, active=True)

    async def by_libvirt() -> str:
        with running_domain(tmp_path / "domain", uri, other.images) as vm, vm.disk() as disk:
            return str(live.merge(disk, other.top).outcome)

    assert asyncio.run(by_libvirt()) == "merged"
