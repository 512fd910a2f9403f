# SPDX-License-Identifier: Apache-2.0
"""A cold command on the images of a running VM names the VM, and the command that works."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chainmerge.errors import ExitCode
from chainmerge.live.found_vm import vm_that_has_open
from tests.support.cli import chainmerge
from tests.support.disks_vm import build_disks
from tests.support.live_scenario import build
from tests.support.live_vm import DEVICE, disk_of_nodes, one_drive, running_vm, separate_nodes
from tests.support.qemu import create

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.support.live_scenario import LiveScenario

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def directory() -> Iterator[Path]:
    """With a short name: those of sockets are short; and with what a shell has to be told."""
    with tempfile.TemporaryDirectory(prefix="it's ", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def scenario(directory: Path) -> LiveScenario:
    return build(directory / "the chain", 3, levels=1, active=False)


@contextlib.contextmanager
def started(directory: Path, name: str, *words: str) -> Iterator[int]:
    """A QEMU that was started in a directory, by its process."""
    with subprocess.Popen(
        [
            "setpriv", "--pdeathsig", "KILL", "--",
            "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-m", "64", "-S",
            "-nodefaults", "-display", "none", "-name", name, *words,
            # It is ready once it says so.
            "-chardev", "stdio,id=ready", "-mon", "chardev=ready,mode=control",
        ],
        cwd=directory,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert b"QMP" in process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()


QMP = ("-qmp", "unix:qmp,server=on,wait=off")
CHARDEV = ("-chardev", "socket,id=q,path=qmp,server=on,wait=off", "-mon", "chardev=q,mode=control")


@pytest.mark.parametrize("monitor", [QMP, CHARDEV])
@pytest.mark.parametrize("disk", [separate_nodes, one_drive])
def test_the_line_from_the_message_works(
    directory: Path,
    scenario: LiveScenario,
    monitor: tuple[str, ...],
    disk: Callable[[Sequence[Path]], list[str]],
) -> None:
    with started(directory, "guest=web,debug-threads=on", *monitor, *disk(scenario.images)) as pid:
        cold = chainmerge("merge", "--delete", "--engine", "native", scenario.top)
        assert cold.status == ExitCode.REFUSED
        assert "image-locked" in cold.err
        assert f"the VM 'web', qemu-system-x86 (pid {pid})" in cold.err
        found = re.search(r"`(chainmerge live merge .*?)`;", cold.err)
        assert found is not None, cold.err
        assert (
            found[1]
            in chainmerge("plan", scenario.top, "--delete", "--json").json["refusals"][0]["hint"]
        )
        words = shlex.split(found[1])
        assert words[1:3] == ["live", "merge"]
        assert "--engine" not in words
        merged = chainmerge(*words[1:])
        assert merged.status == ExitCode.DONE, merged.err
        assert not scenario.top.exists()


def test_the_line_for_several_disks(directory: Path) -> None:
    scenarios = build_disks(directory, 3, kinds=(False, True))
    disks = [
        word
        for number, scenario in enumerate(scenarios)
        for word in disk_of_nodes(scenario.images, f"disk{number}", f"d{number}-")
    ]
    tops = [scenario.top for scenario in scenarios]
    with started(directory, "web", *QMP, *disks):
        cold = chainmerge("merge", "--delete", *tops)
        assert cold.status == ExitCode.REFUSED
        found = re.search(r"`(chainmerge live merge .*?)`;", cold.err)
        assert found is not None, cold.err
        plans = chainmerge("plan", "--delete", "--json", *tops).json["disks"]
        assert all(found[1] in plan["refusals"][0]["hint"] for plan in plans)
        merged = chainmerge(*shlex.split(found[1])[1:])
        assert merged.status == ExitCode.DONE, merged.err
        assert not any(top.exists() for top in tops)


def test_the_line_goes_the_way_that_was_asked_for(directory: Path, scenario: LiveScenario) -> None:
    with started(directory, "web", *QMP, *separate_nodes(scenario.images)):
        cold = chainmerge("merge", "--direction", "pull", scenario.top)
        found = re.search(r"`(chainmerge live merge .*?)`;", cold.err)
        assert found is not None, cold.err
        merged = chainmerge(*shlex.split(found[1])[1:])
        assert merged.status == ExitCode.DONE, merged.err
        assert f"is pulled up into {scenario.top.name}" in merged.out


def test_what_is_not_found_is_not_guessed(directory: Path, scenario: LiveScenario) -> None:
    with running_vm(directory / "vm", scenario.images):
        cold = chainmerge("merge", scenario.top)
        assert f"--qmp SOCKET --device {DEVICE}" in cold.err
        assert "SOCKET is a QMP socket of the VM: none was found" in cold.err


def test_disks_that_share_a_base_are_not_taken_for_one_another(directory: Path) -> None:
    base = create(directory / "base.qcow2", 1 << 20)
    clones = [create(directory / f"{name}.qcow2", backing=base.name) for name in "ab"]
    words = [
        word
        for clone in clones
        for word in (
            *("-drive", f"if=none,id=drive-{clone.stem},file={clone.name},format=qcow2"),
            *("-device", f"virtio-blk-pci,id={clone.stem},drive=drive-{clone.stem}"),
        )
    ]
    with started(directory, "two", *QMP, *words):
        for clone in clones:
            found = vm_that_has_open(clone)
            assert found is not None
            assert found.address == ("--qmp", f"{directory}/qmp", "--device", clone.stem)
        found = vm_that_has_open(base)
        assert found is not None
        assert found.address[-1] == "ID"
    assert vm_that_has_open(base) is None
