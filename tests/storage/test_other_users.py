# SPDX-License-Identifier: Apache-2.0
"""Merges beside users whom QEMU's locks do not keep out, of any image that is concerned."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import pytest

import chainmerge
from chainmerge.merging import deciding, preparing, settling
from chainmerge.options import Access, MergeOptions
from chainmerge.planning.plan import make_plan
from chainmerge.storage.errors import ImageInUse
from tests.support import cli
from tests.support.loopdev import loop_device
from tests.support.qemu import content, create, qemu_io

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from chainmerge.documents.plan import MergePlan
    from chainmerge.planning.facts import MergeFacts

HOLD: Final = """
import os, sys
files = [os.open(name, getattr(os, sys.argv[1])) for name in sys.argv[2:]]
print("ready", flush=True)
sys.stdin.read()
"""
NAMES: Final = ("root", "base", "middle", "top", "child")


@pytest.fixture
def chain(tmp_path: Path) -> dict[str, Path]:
    return build(tmp_path)


def build(directory: Path) -> dict[str, Path]:
    directory.mkdir(exist_ok=True)
    images: dict[str, Path] = {}
    below = None
    for number, name in enumerate(NAMES):
        image = directory / f"{name}.qcow2"
        create(image, None if below else 8 << 20, backing=below)
        qemu_io(image, f"write -P {number + 1} {number}M 1M")
        images[name] = below = image
    return images


@contextmanager
def held(how: str, *paths: Path) -> Iterator[int]:
    """A process that has files open and is nobody's child, as it is to chainmerge."""
    argv = ["sh", "-c", 'exec 3<&0; "$@" <&3 & echo $!', "sh", sys.executable, "-c", HOLD, how]
    with subprocess.Popen(
        [*argv, *map(str, paths)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as shell:
        assert shell.stdout is not None
        assert shell.stdin is not None
        said = {shell.stdout.readline(), shell.stdout.readline()} - {b"ready\n"}
        shell.wait()
        try:
            yield int(said.pop())
        finally:
            shell.stdin.close()
            shell.stdout.read()


def arguments(chain: dict[str, Path], *more: str) -> list[str | Path]:
    return [*more, "--base", chain["base"], chain["top"]]


@pytest.mark.parametrize("direction", ["commit", "pull"])
@pytest.mark.parametrize("name", ["root", "base", "middle", "top"])
def test_a_writer_refuses(chain: dict[str, Path], name: str, direction: str) -> None:
    before = {path: path.read_bytes() for path in chain.values()}
    with held("O_RDWR", chain[name]) as pid:
        for command in ("plan", "merge"):
            ran = cli.chainmerge(command, *arguments(chain, "--direction", direction))
            assert ran.status == 3
            assert f"(pid {pid})" in ran.out + ran.err
    assert {path: path.read_bytes() for path in chain.values()} == before
    assert not list(chain["base"].parent.glob(".*"))
    assert cli.chainmerge("merge", *arguments(chain, "--direction", direction)).status == 0


def test_of_a_child_that_is_repointed(chain: dict[str, Path]) -> None:
    with held("O_RDWR", chain["child"]), pytest.raises(ImageInUse):
        chainmerge.merge(chain["top"], chain["base"])
    with held("O_RDWR", chain["child"]):
        options = MergeOptions(direction="pull")
        chainmerge.merge(chain["top"], chain["base"], options=options)


@pytest.mark.parametrize("engine", ["native", "qemu"])
def test_readers_are_told_of(chain: dict[str, Path], engine: str) -> None:
    expected = content(chain["child"])
    options = MergeOptions(engine="qemu" if engine == "qemu" else "native", delete=True)
    with held("O_RDONLY", *chain.values()) as pid:
        plan = chainmerge.plan(chain["top"], chain["base"], options=options)
        report = chainmerge.merge(chain["top"], chain["base"], options=options)
    assert plan.feasible
    for warnings in (plan.warnings, report.warnings):
        told = [one.split()[0] for one in warnings if f"(pid {pid})" in one]
        assert told == [str(chain[name]) for name in ("base", "middle", "top", "child")]
    assert content(chain["child"]) == expected


def test_through_a_loop_device_over_base(chain: dict[str, Path]) -> None:
    size = -(-chain["base"].stat().st_size // 512) * 512
    with loop_device(chain["base"], size) as device:
        assert chainmerge.plan(chain["top"], chain["base"]).feasible
        with held("O_RDWR", device) as pid:
            plan = chainmerge.plan(chain["top"], chain["base"])
            (refusal,) = plan.refusals
            assert f"(pid {pid}) through {device}" in refusal.sentence
            with pytest.raises(ImageInUse):
                chainmerge.merge(chain["top"], chain["base"])


def test_the_file_below_base_that_is_a_device(tmp_path: Path) -> None:
    with loop_device(tmp_path / "volume", 16 << 20) as base:
        create(base, 8 << 20)
        top = create(tmp_path / "top.qcow2", backing=base)
        qemu_io(top, "write 0 1M")
        access = Access(allow_backing=("/dev",))
        with held("O_RDWR", tmp_path / "volume"), pytest.raises(ImageInUse):
            chainmerge.merge(top, access=access)
        chainmerge.merge(top, access=access)


def test_each_of_several_disks(tmp_path: Path) -> None:
    disks = [build(tmp_path / name) for name in ("one", "two", "three")]
    tops, bases = [disk["top"] for disk in disks], [disk["base"] for disk in disks]
    before = {path: path.read_bytes() for disk in disks for path in disk.values()}
    with held("O_RDWR", bases[2]), held("O_RDONLY", bases[0]):
        plan = chainmerge.plan_disks(tops, bases)
        refused = [[one.code for one in disk.refusals] for disk in plan.disks]
        assert refused == [[], [], ["image-in-use"]]
        assert ["being read by" in " ".join(disk.warnings) for disk in plan.disks] == [
            True,
            False,
            False,
        ]
        with pytest.raises(ImageInUse):
            chainmerge.merge_disks(tops, bases)
    assert {path: path.read_bytes() for path in before} == before
    assert not [file for disk in disks for file in disk["base"].parent.glob(".*")]
    with held("O_RDONLY", bases[0]):
        report = chainmerge.merge_disks(tops, bases)
    warned = [disk.report is not None and bool(disk.report.warnings) for disk in report.disks]
    assert warned[0]
    assert "being read by" not in str(report.disks[1])


def test_what_is_only_left_to_be_deleted(
    chain: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rerun of a merge that was killed before it had deleted everything."""
    monkeypatch.setattr(settling, "note_deleted", lambda _top, _record: None)
    kept = tmp_path / "kept"
    kept.hardlink_to(chain["middle"])
    options = MergeOptions(delete=True)
    chainmerge.merge(chain["top"], chain["base"], options=options)
    kept.rename(chain["middle"])
    access = Access(lock_wait=0)
    with held("O_RDWR", chain["middle"]), pytest.raises(ImageInUse):
        chainmerge.merge(chain["top"], chain["base"], access, options)
    assert chain["middle"].exists()
    chainmerge.merge(chain["top"], chain["base"], access, options)
    assert not chain["middle"].exists()


def test_what_changes_a_single_image(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", 1 << 20)
    before = image.read_bytes()
    commands: tuple[tuple[str | Path, ...], ...] = (
        ("bitmaps", "add", image, "name"),
        ("bitmaps", "prune", "--active", image, image),
        ("repair", "--yes", image),
    )
    with held("O_RDWR", image) as pid:
        for command in commands:
            ran = cli.chainmerge(*command)
            assert ran.status == 3
            assert f"(pid {pid})" in ran.err
    assert image.read_bytes() == before
    assert not list(tmp_path.glob(".*"))
    for command in commands:
        assert cli.chainmerge(*command).status == 0


def test_who_is_gone_at_once_is_no_user(
    chain: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a plan is, which opens what would be written to."""
    with held("O_RDWR", chain["base"]) as pid:

        def sleep(_seconds: float) -> None:
            process = os.pidfd_open(pid)
            signal.pidfd_send_signal(process, signal.SIGKILL)
            select.select([process], [], [])
            os.close(process)
            monkeypatch.undo()

        monkeypatch.setattr(time, "sleep", sleep)
        assert chainmerge.plan(chain["top"], chain["base"]).feasible


@pytest.mark.parametrize("name", ["base", "top"])
def test_who_has_come_and_gone(
    chain: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What was decided rests on what was there before; nothing is written then."""
    with chain[name].open("r+b") as writer:

        def write_unlocked(facts: MergeFacts, options: MergeOptions) -> MergePlan:
            writer.seek(0, os.SEEK_END)
            writer.write(bytes(512))
            writer.flush()
            return make_plan(facts, options)

        monkeypatch.setattr(deciding, "make_plan", write_unlocked)
        before = {path: path.stat().st_size for path in chain.values()}
        with pytest.raises(ImageInUse, match="while it was being examined"):
            chainmerge.merge(chain["top"], chain["base"])
    before[chain[name]] += 512
    assert {path: path.stat().st_size for path in chain.values()} == before


def test_users_are_looked_for_before_anything_is_read(
    chain: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One who has gone when everything is planned may have written while it was."""
    monkeypatch.setattr(preparing, "open_target", _not_to_be_called)
    with held("O_RDWR", chain["base"]), pytest.raises(ImageInUse):
        chainmerge.merge(chain["top"], chain["base"])


def _not_to_be_called(*_arguments: object) -> None:
    raise AssertionError("images were opened beside a writer")
