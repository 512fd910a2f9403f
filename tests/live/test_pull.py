# SPDX-License-Identifier: Apache-2.0
"""Pulls in a running VM whose guest writes all the time: content and bitmaps to the bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chainmerge import live
from chainmerge.live.errors import LiveUnsuited
from chainmerge.options import LiveOptions
from tests.conftest import SOAK
from tests.support.live_scenario import DISK, leftovers_in
from tests.support.live_vm import Guest, one_drive, running_vm, separate_nodes
from tests.support.pull_scenario import assert_pulled_right, build_pull
from tests.support.qemu import content, create, qemu_io

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

SEEDS = range(50 if SOAK else 1)
KINDS = ("middle", "active")


def pull_while_writing(
    directory: Path,
    seed: int,
    kind: str,
    levels: int,
    *,
    onto: bool = True,
    delete: bool = True,
    command_line: Callable[[Sequence[Path]], list[str]] = separate_nodes,
) -> None:
    active = kind == "active"
    scenario = build_pull(directory / "chain", seed, levels=levels, active=active, onto=onto)
    with running_vm(directory / "vm", scenario.images, command_line) as vm:
        with Guest(vm, seed, DISK) as guest:
            options = LiveOptions(direction="pull", delete=delete, bandwidth=32 << 20)
            with vm.disk() as disk:
                plan = live.plan(disk, scenario.top, scenario.base, options=options)
                assert not plan.refusals
                report = live.merge(disk, scenario.top, scenario.base, options=options)
                again = live.merge(disk, scenario.top, scenario.base, options=options)
            during = len(guest.journal)
            guest.wait_for(during + 10)
        assert during > 1
        assert again.outcome == "already-merged"
        assert vm.chain() == scenario.chain_after
        assert vm.jobs() == []
        assert set(report.deleted) == {str(path) for path in scenario.pulled if delete}
        vm.quit()
    assert_pulled_right(scenario, guest, deleted=delete)
    assert leftovers_in(scenario.top.parent) == []
    assert plan.space.required >= scenario.top.stat().st_size or active


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("levels", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost_while_the_guest_writes(
    tmp_path: Path, kind: str, levels: int, seed: int
) -> None:
    pull_while_writing(tmp_path, seed, kind, levels)


@pytest.mark.parametrize("kind", KINDS)
def test_down_to_the_root_nothing_is_left_below(tmp_path: Path, kind: str) -> None:
    pull_while_writing(tmp_path, 3, kind, 2, onto=False)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_pulled_stays_as_it_was(tmp_path: Path, kind: str) -> None:
    pull_while_writing(tmp_path, 5, kind, 2, delete=False)


@pytest.mark.parametrize("kind", KINDS)
def test_nodes_whose_names_qemu_made_up(tmp_path: Path, kind: str) -> None:
    pull_while_writing(tmp_path, 7, kind, 2, command_line=one_drive)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("levels", [1, 2])
def test_what_a_short_image_hides_is_not_to_show(tmp_path: Path, kind: str, levels: int) -> None:
    """Behind the end of the image right below it, QEMU puts no zeros into top."""
    images = [create(tmp_path / "root", DISK)]
    qemu_io(images[0], f"write -q -P 1 0 {DISK}")
    for number, size in enumerate([DISK, DISK // 2][-levels:]):
        images.append(create(tmp_path / f"{number}", size, backing=images[-1]))
    base = images[1]
    images.append(create(tmp_path / "top", DISK, backing=images[-1]))
    top = images[-1]
    if kind == "middle":
        images.append(create(tmp_path / "above", DISK, backing=top))
    options, before = LiveOptions(direction="pull"), content(images[-1])
    with running_vm(tmp_path / "vm", images) as vm:
        with vm.disk() as disk, pytest.raises(LiveUnsuited, match="hides"):
            live.merge(disk, top, base, options=options)
        assert vm.jobs() == []
        vm.quit()
    assert content(images[-1]) == before
    # What was shortened down to the root hides nothing any more.
    with running_vm(tmp_path / "again", images) as vm:
        with vm.disk() as disk:
            live.merge(disk, top, images[0], options=options)
        vm.quit()
    assert content(images[-1]) == before
