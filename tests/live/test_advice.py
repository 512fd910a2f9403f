# SPDX-License-Identifier: Apache-2.0
"""What people are told to do while a VM has the images open, and what if they do it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from chainmerge import live
from chainmerge.catalogue import known_errors
from chainmerge.cli.live import merge as merge_command
from chainmerge.live.advice import advice_for_running_vm, for_running_vm
from chainmerge.planning.errors import SnapshotsWouldChange
from tests.support.cli import chainmerge as command
from tests.support.live_scenario import build
from tests.support.live_vm import running_vm
from tests.support.qemu import content, create

if TYPE_CHECKING:
    from pathlib import Path

    from chainmerge.errors import ChainmergeError

OPTIONS = {name for option in merge_command.params for name in option.opts if name[:2] == "--"}
# The disk of the VM, and what `chainmerge check` and others take.
OTHERS = {"--connect", "--device", "--node"}
ERRORS = [error for code, error in known_errors().items() if code]


def example(kind: type[ChainmergeError]) -> ChainmergeError:
    values = {"str": "x", "int": 1, "float": 1.5}
    return kind(*(values.get(written, "x") for written in kind.fact_types.values()))


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.code)
def test_no_hint_names_what_a_live_merge_does_not_have(kind: type[ChainmergeError]) -> None:
    found = for_running_vm(example(kind))
    named = set(re.findall(r"--[a-z][a-z-]*", found.advice))
    assert named <= OPTIONS | OTHERS or found.advice.startswith("not while the VM runs: stop it")
    assert found.code == kind.code
    assert found.sentence == example(kind).sentence


def test_the_same_error_is_raised() -> None:
    with pytest.raises(SnapshotsWouldChange) as raised, advice_for_running_vm():
        raise SnapshotsWouldChange("/base", "'before'", "")
    assert raised.value.facts == {"image": "/base", "names": "'before'", "instead": ""}
    assert "stop it" in raised.value.advice


@pytest.mark.timeout(120)
def test_the_way_out_of_a_refusal_is_open_while_the_vm_runs(tmp_path: Path) -> None:
    scenario = build(tmp_path / "chain", 3, levels=1, active=False)
    sibling = create(scenario.base.with_name("sibling.qcow2"), backing=scenario.base.name)
    before = content(sibling)
    with running_vm(tmp_path / "vm", scenario.images) as vm:
        with vm.disk() as disk:
            (refusal,) = live.plan(disk, scenario.top).refusals
            assert refusal.hint.startswith("pull instead (--direction pull)")
        ran = command("live", "merge", *vm.arguments, scenario.top)
        assert ran.status == 3
        assert "pull instead (--direction pull)" in " ".join(ran.err.split())
        ran = command("live", "merge", "--direction", "pull", *vm.arguments, scenario.top)
        assert ran.status == 0, ran.err
        assert f"{scenario.base.name} is pulled up into {scenario.top.name}" in ran.out
        vm.quit()
    assert content(sibling) == before
    assert content(scenario.images[-1]) == scenario.before
