# SPDX-License-Identifier: Apache-2.0
"""Images that others have begun to use while a VM was merging them are not deleted."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge import live
from chainmerge.documents.progress import Stage
from chainmerge.errors import ExitCode
from chainmerge.options import LiveOptions
from chainmerge.storage.locks import LockMode, lock_image
from tests.support.cli import chainmerge as command
from tests.support.live_scenario import DISK
from tests.support.live_vm import running_vm
from tests.support.qemu import content, create, qemu_io

if TYPE_CHECKING:
    from pathlib import Path

    from chainmerge.documents.progress import ProgressEvent

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    root = create(tmp_path / "root.qcow2", DISK)
    base = create(tmp_path / "base.qcow2", backing=root.name)
    top = create(tmp_path / "top.qcow2", backing=base.name)
    for number, image in enumerate((root, base, top)):
        qemu_io(image, f"write -q -P {number + 1} {number}M 1M")
    return [root, base, top]


@pytest.mark.parametrize("direction", ["pull", "commit"])
def test_an_overlay_made_since(tmp_path: Path, images: list[Path], direction: str) -> None:
    _, base, top = images
    merged = base if direction == "pull" else top
    clone, expected = tmp_path / "clone.qcow2", content(merged)

    def clone_it(event: ProgressEvent) -> None:
        if event.stage is Stage.VERIFY and not clone.exists():
            create(clone, backing=merged.name)

    options = LiveOptions(direction=direction, delete=True)  # type: ignore[arg-type]
    with running_vm(tmp_path / "vm", images) as vm, vm.disk() as disk:
        report = live.merge(disk, top, base, options=options, on_progress=clone_it)
        vm.quit()
    assert report.deleted == ()
    assert any(str(clone) in warning for warning in report.warnings)
    # What has the data of a merged image must not be merged once more, nor go now.
    assert chainmerge.status([tmp_path]).merges == ()
    again = command("merge", top, "--base", base, f"--direction={direction}", "--delete")
    assert again.status in (ExitCode.DONE, ExitCode.REFUSED)
    assert content(clone) == expected


@pytest.mark.parametrize("direction", ["pull", "commit"])
def test_somebody_has_it_open(tmp_path: Path, images: list[Path], direction: str) -> None:
    _, base, top = images
    merged = base if direction == "pull" else top
    options = LiveOptions(direction=direction, delete=True)  # type: ignore[arg-type]
    with contextlib.ExitStack() as stack, running_vm(tmp_path / "vm", images) as vm:

        def read_it(event: ProgressEvent) -> None:
            if event.stage is Stage.SETTLE:
                stack.enter_context(lock_image(merged, LockMode.READER, 0))

        with vm.disk() as disk:
            report = live.merge(disk, top, base, options=options, on_progress=read_it)
        vm.quit()
    assert report.deleted == ()
    assert merged.exists()
    assert any(str(merged) in warning for warning in report.warnings)
