# SPDX-License-Identifier: Apache-2.0
"""Merges that are interrupted, and finished when volumes have other device numbers.

That is what a boot does, or another host: numbers go to volumes as they come up.
"""

from __future__ import annotations

import os
import shlex
import signal
from typing import TYPE_CHECKING, Any

import pytest

import chainmerge
from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.options import MergeOptions
from chainmerge.records.files import STATE_DIRECTORY
from tests.support.qemu import assert_clean, bitmap_names, content, create, info, qemu_img, qemu_io
from tests.vm.commands import chainmerge_forked
from tests.vm.guest.volumes import MIB, Group

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DISK = 8 * MIB


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """No test finds what another one, here or elsewhere, has left of volumes that are gone."""
    _forget_all()
    yield
    _forget_all()


def _forget_all() -> None:
    if STATE_DIRECTORY.exists():
        for file in STATE_DIRECTORY.iterdir():
            file.unlink()


def left() -> list[str]:
    """The names of the small files of volumes."""
    return sorted(file.name for file in STATE_DIRECTORY.iterdir())


def chain(group: Group, *names: str, seed: int = 1) -> list[Path]:
    """Images on volumes, the root first, with a checkpoint that all of them have."""
    images: list[Path] = []
    for number, name in enumerate(names):
        volume = group.create(name, 12 * MIB)
        image = create(volume, *(() if images else (DISK,)), backing=images[-1] if images else None)
        qemu_img("bitmap", "--add", "-f", "qcow2", image, "good")
        qemu_io(image, f"write -P {seed + number} {number}M 2M")
        images.append(image)
    return images


def renumbered(group: Group, *volumes: str) -> None:
    """Bring volumes up again so that each gets the number that another one had."""
    before = {name: os.path.realpath(group.path(name)) for name in volumes}
    group.deactivate(*volumes)
    half = len(volumes) // 2
    for name in (*volumes[half:], *volumes[:half]):
        group.activate(name)
    after = {name: os.path.realpath(group.path(name)) for name in volumes}
    assert all(before[name] != after[name] for name in volumes), (before, after)
    assert {*before.values()} == {*after.values()}


def killed_at(stage: Stage, top: Path, **options: Any) -> None:
    """Merge in a process that kills itself when *stage* is announced."""
    pid = os.fork()
    if pid == 0:

        def on_progress(event: ProgressEvent) -> None:
            if event.stage is stage:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            chainmerge.merge(top, options=MergeOptions(**options), on_progress=on_progress)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def unfinished(*paths: Path) -> list[dict[str, Any]]:
    ran = chainmerge_forked("status", "--json", *paths)
    assert ran.status in (0, 5), ran
    merges: list[dict[str, Any]] = ran.json["merges"]
    return merges


def assert_named_as_now(merge: dict[str, Any], base: Path, top: Path) -> None:
    """Fail unless a merge is told of by where its images are."""
    assert os.path.realpath(merge["base"]) == os.path.realpath(base), merge
    assert os.path.realpath(merge["top"]) == os.path.realpath(top), merge
    assert "/dm-" not in merge["command"], merge


def finished_by(merge: dict[str, Any]) -> None:
    """Run the command that ``status`` prints."""
    program, *arguments = shlex.split(merge["command"])
    assert program == "chainmerge"
    ran = chainmerge_forked(*arguments)
    assert ran.status == 0, ran


NATIVE = {"engine": "native"}
WAYS: dict[str, tuple[Stage, dict[str, Any]]] = {
    "natively, before the switch": (Stage.VERIFY, {**NATIVE, "data": "cow"}),
    "natively, in place": (Stage.VERIFY, {**NATIVE, "data": "in-place"}),
    "natively, after the switch": (Stage.SETTLE, {**NATIVE, "data": "cow"}),
    "by QEMU, copying": (Stage.COPY, {"engine": "qemu"}),
    "by QEMU, copied": (Stage.BITMAPS, {"engine": "qemu"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_merge_is_found_and_finished(group: Group, way: str) -> None:
    stage, options = WAYS[way]
    base, top = chain(group, "base", "top")
    # After the new numbers these have those of the others.
    others = chain(group, "other-base", "other-top", seed=11)
    seen, seen_of_others = content(top), content(others[1])
    killed_at(stage, top, **options)
    files = left()
    assert files
    renumbered(group, "base", "top", "other-base", "other-top")
    assert content(top) == seen
    assert unfinished(others[1]) == []
    assert chainmerge_forked("merge", others[1]).status == 0
    assert content(others[0]) == seen_of_others
    assert set(files) <= {*left()}
    for asked in ((base,), (top,), ()):
        (merge,) = unfinished(*asked)
        assert_named_as_now(merge, base, top)
    finished_by(merge)
    assert content(base) == seen
    assert bitmap_names(base)["good"]["flags"] == ["auto"]
    assert_clean(base)
    assert unfinished() == []
    assert not {*files} & {*left()}


def test_a_pull_is_found_and_finished(group: Group) -> None:
    root, base, top = chain(group, "root", "base", "top")
    seen = content(top)
    killed_at(Stage.VERIFY, top, direction="pull")
    renumbered(group, "root", "base", "top")
    for asked in ((base,), (top,), ()):
        (merge,) = unfinished(*asked)
        assert_named_as_now(merge, base, top)
    finished_by(merge)
    assert_pulled_once(root, top, seen)
    assert unfinished() == []


def assert_pulled_once(root: Path, top: Path, seen: bytes) -> None:
    """Fail if nothing was pulled, or what stands below that as well."""
    assert os.path.realpath(info(top)["full-backing-filename"]) == os.path.realpath(root)
    assert content(top) == seen
    assert bitmap_names(top)["good"]["flags"] == ["auto"]
    assert_clean(top)


@pytest.mark.parametrize("named", [False, True])
def test_a_pull_that_is_done_stays_done(group: Group, named: bool) -> None:
    """Top stands on the next image then, which the same command would pull."""
    root, base, top = chain(group, "root", "base", "top")
    seen = content(top)
    command = ("merge", "--json", "--direction", "pull", *(("--base", base) if named else ()), top)
    assert chainmerge_forked(*command).status == 0
    assert_pulled_once(root, top, seen)
    renumbered(group, "root", "base", "top")
    ran = chainmerge_forked(*command)
    assert ran.status == 0, ran
    assert ran.json["outcome"] == "already-merged"
    assert_pulled_once(root, top, seen)


def test_a_pull_that_was_killed_when_it_was_done_stays_done(group: Group) -> None:
    root, base, top = chain(group, "root", "base", "top")
    seen = content(top)
    killed_at(Stage.SETTLE, top, direction="pull")
    renumbered(group, "root", "base", "top")
    assert unfinished() == []
    ran = chainmerge_forked("merge", "--json", "--direction", "pull", top)
    assert ran.status == 0, ran
    assert ran.json["outcome"] == "already-merged"
    assert_pulled_once(root, top, seen)
    assert base.exists()


def test_a_number_that_another_volume_has_got_tells_nothing(group: Group) -> None:
    """What was pulled from is gone, and what is asked for is called as it was."""
    root, base, top = chain(group, "root", "base", "top")
    seen, number = content(top), os.path.realpath(base)
    assert chainmerge_forked("merge", "--direction", "pull", top).status == 0
    group.deactivate("root", "base", "top")
    for name in ("top", "root") if number.endswith("1") else ("root", "top"):
        group.activate(name)
    assert os.path.realpath(root) == number
    ran = chainmerge_forked("merge", "--json", "--direction", "pull", "--base", root, top)
    assert ran.status == 0, ran
    assert ran.json["outcome"] == "merged"
    assert "backing-filename" not in info(top)
    assert content(top) == seen


def test_a_merge_of_volumes_that_are_not_up_is_told_of_by_their_names(group: Group) -> None:
    base, top = chain(group, "base", "top")
    others = chain(group, "other-base", "other-top", seed=11)
    killed_at(Stage.VERIFY, top, data="cow")
    group.deactivate("base", "top", "other-base", "other-top")
    group.activate("other-base", "other-top")
    for other in others:
        assert unfinished(other) == []
    (merge,) = unfinished()
    assert merge["base"] == str(base)
    assert merge["top"] == str(top)
    group.activate("base", "top")
    (merge,) = unfinished(top)
    assert_named_as_now(merge, base, top)


def test_several_disks_are_found_and_finished(group: Group) -> None:
    """The second of them had not begun, and one entry tells of it."""
    base, top = chain(group, "base", "top")
    others = chain(group, "other-base", "other-top", seed=11)
    seen, seen_of_others = content(top), content(others[1])
    pid = os.fork()
    if pid == 0:

        def on_progress(event: ProgressEvent) -> None:
            if event.stage is Stage.VERIFY:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            chainmerge.merge_disks([top, others[1]], on_progress=on_progress)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    renumbered(group, "base", "top", "other-base", "other-top")
    found = unfinished()
    assert len(found) == 2
    for merge in found:
        first = os.path.realpath(merge["base"]) == os.path.realpath(base)
        assert_named_as_now(merge, *((base, top) if first else others))
    finished_by(found[0])
    assert content(base) == seen
    assert content(others[0]) == seen_of_others
    assert unfinished() == []
