# SPDX-License-Identifier: Apache-2.0
"""Somebody else's job works on the disk: it is named, and nothing is said to be broken."""

from __future__ import annotations

from typing import TYPE_CHECKING

import libvirt
import pytest

import chainmerge
from chainmerge import live
from chainmerge.live.errors import LiveJobRunning
from tests.support.cli import chainmerge as command
from tests.support.domain_vm import TARGET, running_domain
from tests.support.live_scenario import DISK
from tests.support.live_vm import running_vm
from tests.support.qemu import create, qemu_io

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.domain_vm import TestDomain
    from tests.support.live_vm import LiveTestVm

pytestmark = pytest.mark.timeout(120)

SLOWLY = 1 << 16


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Five images, all with data and a checkpoint."""
    found: list[Path] = []
    for number in range(5):
        below = found[-1].name if found else None
        image = create(tmp_path / f"{number}.qcow2", None if below else DISK, backing=below)
        chainmerge.bitmaps_add(image, "checkpoint")
        qemu_io(image, f"write -q -P {number + 1} {number}M 16M")
        found.append(image)
    return found


def commit(vm: LiveTestVm, directory: Path) -> None:
    """Another merge, whose base is read-only otherwise: its bitmaps are in-use on disk now."""
    vm.execute(
        "block-commit",
        job_id="theirs", device="image4", top_node="image2", base_node="image1", speed=SLOWLY,
    )  # fmt: skip


def commit_of_the_active_image(vm: LiveTestVm, directory: Path) -> None:
    vm.execute("block-commit", job_id="theirs", device="image4", base_node="image0", speed=SLOWLY)


def stream(vm: LiveTestVm, directory: Path) -> None:
    vm.execute("block-stream", job_id="theirs", device="image4", base_node="image1", speed=SLOWLY)


def backup(vm: LiveTestVm, directory: Path) -> None:
    _add_target(vm, directory)
    vm.execute(
        "blockdev-backup",
        job_id="theirs", device="image4", target="copy", sync="full", speed=SLOWLY,
    )  # fmt: skip


def mirror(vm: LiveTestVm, directory: Path) -> None:
    _add_target(vm, directory)
    vm.execute(
        "blockdev-mirror",
        job_id="theirs", device="image4", target="copy", sync="full", speed=SLOWLY,
    )  # fmt: skip


def _add_target(vm: LiveTestVm, directory: Path) -> None:
    copy = create(directory / "copy.qcow2", DISK)
    vm.execute("blockdev-add", driver="file", node_name="copy-file", filename=str(copy))
    vm.execute("blockdev-add", driver="qcow2", node_name="copy", file="copy-file")


JOBS = (
    (commit, "commit"),
    (commit_of_the_active_image, "commit"),
    (stream, "stream"),
    (backup, "backup"),
    (mirror, "mirror"),
)


def assert_named(disk: live.LiveDisk, top: Path, name: str) -> None:
    """Neither the plan nor the merge gets any further."""
    for call in (live.plan, live.merge):
        with pytest.raises(LiveJobRunning) as running:
            call(disk, top)
        assert name in running.value.sentence
        assert "let them end" in running.value.advice


@pytest.mark.parametrize(("job", "kind"), JOBS)
@pytest.mark.parametrize("top", [1, 2, 4])
def test_by_qmp(
    tmp_path: Path,
    images: list[Path],
    job: Callable[[LiveTestVm, Path], None],
    kind: str,
    top: int,
) -> None:
    (tmp_path / "elsewhere").mkdir()
    with running_vm(tmp_path / "vm", images) as vm:
        job(vm, tmp_path / "elsewhere")
        with vm.disk() as disk:
            assert_named(disk, images[top], f"theirs ({kind})")
        ran = command("live", "plan", *vm.arguments, images[top])
        assert ran.status == 3
        assert "theirs" in ran.err
        assert "remove the bitmap" not in ran.err
        assert len(vm.jobs()) == 1


def their_commit(vm: TestDomain, images: list[Path], directory: Path) -> None:
    vm.domain.blockCommit(TARGET, str(images[1]), str(images[2]), 1, 0)


def their_pull(vm: TestDomain, images: list[Path], directory: Path) -> None:
    vm.domain.blockRebase(TARGET, str(images[1]), 1, 0)


def their_copy(vm: TestDomain, images: list[Path], directory: Path) -> None:
    copy = directory / "copy.qcow2"
    vm.domain.blockCopy(
        TARGET,
        f"<disk type='file'><source file='{copy}'/><driver type='qcow2'/></disk>",
        {libvirt.VIR_DOMAIN_BLOCK_COPY_BANDWIDTH: SLOWLY},
        libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB,
    )


JOBS_OF_LIBVIRT = ((their_commit, "commit"), (their_pull, "pull"), (their_copy, "copy"))


@pytest.mark.parametrize(("job", "kind"), JOBS_OF_LIBVIRT)
def test_by_libvirt(
    tmp_path: Path,
    uri: str,
    images: list[Path],
    job: Callable[[TestDomain, list[Path], Path], None],
    kind: str,
) -> None:
    (tmp_path / "elsewhere").mkdir()
    with running_domain(tmp_path / "vm", uri, images) as vm:
        job(vm, images, tmp_path / "elsewhere")
        with vm.disk() as disk:
            assert_named(disk, images[1], f"{kind} of {TARGET}")
        assert vm.jobs() == ["running"]
