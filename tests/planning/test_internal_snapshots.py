# SPDX-License-Identifier: Apache-2.0
"""A merge leaves what internal snapshots show, or is refused, or removes them as asked for."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import pytest
from hypothesis import event, given, note, settings
from hypothesis import strategies as st
from msgspec import Struct
from msgspec.structs import replace

import chainmerge
from chainmerge.chain.errors import ImageDirty
from chainmerge.documents.merge import MergeOutcome
from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.errors import Refused
from chainmerge.merging.errors import MergeUnfinished
from chainmerge.options import Access, DataChoice, DirectionChoice, EngineChoice, MergeOptions
from chainmerge.planning.errors import ChildSeesMore, SnapshotsWouldChange, SnapshotsWouldGo
from tests.chain.unchanged import refusal, state
from tests.support.loopdev import loop_device
from tests.support.qemu import (
    assert_clean,
    bitmap_names,
    check,
    content,
    create,
    info,
    qemu_img,
    qemu_io,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainmerge.documents.merge import MergeReport

MIB = 1 << 20
CELL = 65536
CELLS = 8
DROP = MergeOptions(drop_snapshots=True)
WAYS: list[tuple[EngineChoice, DirectionChoice]] = [
    ("native", "commit"),
    ("native", "pull"),
    ("qemu", "commit"),
]


def shown(image: Path, snapshot: str) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "raw"
        qemu_img("convert", "-U", "-l", snapshot, "-O", "raw", image, raw)
        return raw.read_bytes()


def listed(image: Path) -> list[str]:
    return [one["name"] for one in info(image).get("snapshots", [])]


def snapshot(image: Path, name: str) -> None:
    qemu_img("snapshot", "-c", name, image)


def chain_of(directory: Path, count: int, **options: str | int) -> list[Path]:
    """Images over one another, each with data of its own in the first MiB and elsewhere."""
    paths: list[Path] = []
    for number in range(count):
        path = directory / f"{number}.qcow2"
        below = paths[-1].name if paths else None
        create(path, 8 * MIB if not paths else None, backing=below, **options)  # type: ignore[arg-type]
        qemu_io(path, f"write -q -P {number + 1} {number}M 64k", f"write -q -P {number + 65} 0 64k")
        paths.append(path)
    return paths


# What is refused


@pytest.mark.parametrize(("engine", "direction"), WAYS)
def test_a_snapshot_of_top_that_reads_from_below_refuses(
    tmp_path: Path, engine: EngineChoice, direction: DirectionChoice
) -> None:
    _, _, top = chain_of(tmp_path, 3)
    snapshot(top, "keep")
    qemu_io(top, "write -q -P 99 1M 64k")
    options = MergeOptions(engine=engine, direction=direction)
    error = refusal(SnapshotsWouldChange, tmp_path, lambda: chainmerge.merge(top, options=options))
    assert (error.image, error.names) == (str(top), "'keep'")
    plan = chainmerge.plan(top, options=options)
    assert [one.code for one in plan.refusals] == ["snapshots-would-change"]
    (planned,) = plan.snapshots
    assert (planned.kept, planned.lost, planned.dropped) == ((), ("keep",), ())


def test_a_snapshot_between_refuses_and_a_pull_leaves_it(tmp_path: Path) -> None:
    base, middle, top = chain_of(tmp_path, 3)
    snapshot(middle, "keep")
    qemu_io(middle, "write -q -P 99 4M 64k")
    before = shown(middle, "keep")
    error = refusal(SnapshotsWouldChange, tmp_path, lambda: chainmerge.merge(top, base))
    assert error.image == str(middle)
    assert "--direction pull" in error.advice
    chainmerge.merge(top, base, options=MergeOptions(direction="pull"))
    assert shown(middle, "keep") == before


def test_what_a_pull_would_change_a_commit_leaves(tmp_path: Path) -> None:
    """Nothing was written to top since, so base gets what the snapshot has itself."""
    _, base, top = chain_of(tmp_path, 3)
    snapshot(top, "keep")
    before = shown(top, "keep")
    pull = MergeOptions(direction="pull")
    error = refusal(SnapshotsWouldChange, tmp_path, lambda: chainmerge.merge(top, options=pull))
    assert "--direction commit" in error.advice
    assert chainmerge.merge(top).outcome is MergeOutcome.MERGED
    assert shown(top, "keep") == before
    assert content(base) == content(top)


@pytest.mark.parametrize("option", ["delete", "keep_name"])
def test_snapshots_go_with_their_image_only_where_they_may(tmp_path: Path, option: str) -> None:
    base, top = chain_of(tmp_path, 2)
    snapshot(top, "keep")
    view = content(top)
    options = MergeOptions(
        direction="commit", delete=option == "delete", keep_name=option == "keep_name"
    )
    error = refusal(SnapshotsWouldGo, tmp_path, lambda: chainmerge.merge(top, options=options))
    assert error.names == "'keep'"
    # The same merge without the option changes no snapshot.
    assert error.advice.startswith("leave out --")
    chainmerge.merge(top, options=replace(options, drop_snapshots=True))
    assert content(base if option == "delete" else top) == view


def test_a_pull_deletes_base_with_snapshots_only_where_they_may(tmp_path: Path) -> None:
    _, base, top = chain_of(tmp_path, 3)
    snapshot(base, "keep")
    view = content(top)
    pull = MergeOptions(direction="pull", delete=True)
    refusal(SnapshotsWouldGo, tmp_path, lambda: chainmerge.merge(top, options=pull))
    pull = MergeOptions(direction="pull", delete=True, drop_snapshots=True)
    chainmerge.merge(top, options=pull)
    assert not base.exists()
    assert content(top) == view


def test_a_snapshot_with_everything_of_its_own_is_left(tmp_path: Path) -> None:
    _, base, top = chain_of(tmp_path, 3)
    qemu_io(top, "write -q -P 50 0 8M")
    snapshot(top, "whole")
    qemu_io(top, "write -q -P 51 0 8M")
    before = shown(top, "whole")
    for direction in get_args(DirectionChoice):
        options = MergeOptions(direction=direction)
        assert chainmerge.plan(top, options=options).snapshots[0].kept == ("whole",)
    chainmerge.merge(top)
    assert shown(top, "whole") == before
    assert content(base) == content(top)


def test_a_larger_disk_of_a_snapshot_counts(tmp_path: Path) -> None:
    """Reverted to, the snapshot reads from below where the disk of today ends before."""
    _, _, top = chain_of(tmp_path, 3)
    qemu_img("resize", "-q", top, "16M")
    qemu_io(top, "write -q -P 50 0 8M")
    snapshot(top, "large")
    qemu_img("resize", "-q", "--shrink", top, "8M")
    pull = MergeOptions(direction="pull")
    assert chainmerge.plan(top, options=pull).snapshots[0].lost == ("large",)


def test_a_snapshot_of_a_child_that_would_see_more_of_base(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2", 16 * MIB)
    qemu_io(base, "write -q -P 1 0 16M")
    top = create(tmp_path / "top.qcow2", 8 * MIB, backing="base.qcow2")
    qemu_io(top, "write -q -P 2 0 1M")
    child = create(tmp_path / "child.qcow2", 16 * MIB, backing="top.qcow2")
    snapshot(child, "large")
    qemu_img("resize", "-q", "--shrink", child, "8M")
    error = refusal(ChildSeesMore, tmp_path, lambda: chainmerge.merge(top))
    assert (error.child, error.child_size) == (f"internal snapshot 'large' of {child}", 16 * MIB)
    chainmerge.merge(top, options=MergeOptions(direction="pull"))
    qemu_img("snapshot", "-a", "large", child)
    assert content(child)[8 * MIB :] == bytes(8 * MIB)


def test_children_keep_their_snapshots(tmp_path: Path) -> None:
    base, top, child = chain_of(tmp_path, 3)
    qemu_io(top, "write -q -P 9 3M 64k")
    snapshot(child, "keep")
    qemu_io(child, "write -q -P 10 0 4M")
    before = shown(child, "keep")
    chainmerge.merge(top, base, options=MergeOptions(delete=True))
    assert shown(child, "keep") == before


def test_base_keeps_its_snapshots_also_where_its_disk_grows(tmp_path: Path) -> None:
    _, base, top = chain_of(tmp_path, 3)
    snapshot(base, "keep")
    qemu_io(base, "write -q -P 77 0 2M")
    qemu_img("resize", "-q", top, "16M")
    qemu_io(top, "write -q -P 78 0 16M")
    before = shown(base, "keep")
    for data in get_args(DataChoice):
        plan = chainmerge.plan(top, options=MergeOptions(data=data))
        assert plan.feasible
        assert plan.snapshots[0].kept == ("keep",)
    chainmerge.merge(top, options=MergeOptions(data="in-place"))
    assert shown(base, "keep")[: len(before)] == before
    qemu_img("snapshot", "-a", "keep", base)
    assert content(base) == before


# What is removed


@pytest.mark.parametrize(("engine", "direction"), WAYS)
def test_dropped_snapshots_are_gone_and_the_rest_is_left(
    tmp_path: Path, engine: EngineChoice, direction: DirectionChoice
) -> None:
    root, base, middle, top = chain_of(tmp_path, 4)
    qemu_img("bitmap", "--add", top, "checkpoint")
    for path in (base, middle, top):
        snapshot(path, "reads-from-below")
    qemu_io(top, "write -q -P 50 0 8M")
    snapshot(top, "whole")
    qemu_io(top, "write -q -P 51 0 4M")
    view = content(top)
    before = {
        path: {name: shown(path, name) for name in listed(path)} for path in (base, middle, top)
    }
    options = MergeOptions(engine=engine, direction=direction, drop_snapshots=True)
    plan = chainmerge.plan(top, base, options=options)
    assert plan.feasible, plan.refusals
    report = chainmerge.merge(top, base, options=options)
    assert report.plan is not None
    assert report.plan.snapshots == plan.snapshots
    dropped = {one.image: one.dropped for one in plan.snapshots if one.dropped}
    gone = ("reads-from-below",)
    expected = {str(top): gone, str(middle): gone} if direction == "commit" else {str(top): gone}
    assert dropped == expected
    assert f"the internal snapshot 'reads-from-below' of {top} is deleted" in report.warnings
    for path in (base, middle, top):
        assert listed(path) == [
            name for name in before[path] if name not in dropped.get(str(path), ())
        ]
        assert all(shown(path, name) == before[path][name] for name in listed(path))
        assert_clean(path)
    assert content(top) == view
    assert content(top if direction == "pull" else base) == view
    assert "checkpoint" in bitmap_names(top if direction == "pull" else base)
    assert content(root)


def test_the_plan_says_what_comes_free(tmp_path: Path) -> None:
    base, top = chain_of(tmp_path, 2)
    qemu_io(top, "write -q -P 50 2M 4M")
    snapshot(top, "large")
    qemu_io(top, "write -q -P 51 1M 6M")
    (planned,) = chainmerge.plan(top, options=DROP).snapshots
    used = check(top)["image-end-offset"] // CELL
    assert planned.dropped == ("large",)
    assert 4 * MIB <= planned.freed <= used * CELL
    before = top.stat().st_blocks
    chainmerge.merge(top, options=DROP)
    assert (before - top.stat().st_blocks) * 512 >= 4 * MIB
    assert content(base) == content(top)


def test_snapshots_with_the_state_of_a_vm(tmp_path: Path) -> None:
    base, top = chain_of(tmp_path, 2)
    command = "qemu-system-x86_64 -M pc -m 16 -accel tcg -S -display none -monitor stdio"
    drive = f"file={top},format=qcow2,if=virtio"
    subprocess.run(
        [*command.split(), "-drive", drive],
        input="savevm state\nquit\n",
        text=True,
        check=True,
        capture_output=True,
    )
    assert info(top)["snapshots"][0]["vm-state-size"] > 0
    qemu_io(top, "write -q -P 9 4M 1M")
    view = content(top)
    refusal(SnapshotsWouldChange, tmp_path, lambda: chainmerge.merge(top))
    (planned,) = chainmerge.plan(top, options=DROP).snapshots
    assert planned.freed > info(top)["snapshots"][0]["vm-state-size"]
    chainmerge.merge(top, options=DROP)
    assert listed(top) == []
    assert_clean(top)
    assert content(top) == content(base) == view


def test_an_image_that_must_be_repaired_first_refuses(tmp_path: Path) -> None:
    _, top = chain_of(tmp_path, 2, lazy_refcounts="on")
    snapshot(top, "goes")
    qemu_io(top, "write -q -P 5 5M 64k")
    data = bytearray(top.read_bytes())
    data[79] |= 1
    top.write_bytes(data)
    refusal(ImageDirty, tmp_path, lambda: chainmerge.merge(top, options=DROP))


def test_a_pull_into_a_device_of_the_planned_size(tmp_path: Path) -> None:
    root, base, template = chain_of(tmp_path, 3)
    qemu_io(base, "write -q -P 33 4M 2M")
    snapshot(template, "goes")
    qemu_io(template, "write -q -P 50 0 1M")
    view = content(template)
    (tmp_path / "devices").mkdir()
    options = MergeOptions(direction="pull", drop_snapshots=True)
    device_file = tmp_path / "devices" / "behind"
    plan = chainmerge.plan(template, options=options)
    required = plan.space.required
    data = template.read_bytes()
    template.unlink()
    with loop_device(device_file, required) as device:
        device.write_bytes(data[:required])
        template.symlink_to(device)
        access = Access(allow_backing=("/dev", str(tmp_path)), search=(str(tmp_path),))
        qemu_img("rebase", "-q", "-u", "-F", "qcow2", "-b", base, device)
        assert chainmerge.plan(device, access=access, options=options).space.required == required
        chainmerge.merge(device, access=access, options=options)
        assert listed(device) == []
        assert content(device) == view
        assert_clean(device)
    assert content(root)


def test_several_disks(tmp_path: Path) -> None:
    chains = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        chains.append(chain_of(tmp_path / name, 2))
    tops = [top for _, top in chains]
    snapshot(tops[1], "goes")
    qemu_io(tops[1], "write -q -P 50 2M 1M")
    views = [content(top) for top in tops]
    error = refusal(SnapshotsWouldChange, tmp_path, lambda: chainmerge.merge_disks(tops))
    assert error.image == str(tops[1])
    report = chainmerge.merge_disks(tops, options=DROP)
    assert all(disk.report is not None for disk in report.disks)
    assert [content(base) for base, _ in chains] == views
    assert listed(tops[1]) == []


# Whatever stops it


@pytest.mark.parametrize(("engine", "direction"), WAYS)
@pytest.mark.parametrize(
    "stage", [Stage.SNAPSHOTS, Stage.PRUNE, Stage.COPY, Stage.VERIFY, Stage.SETTLE]
)
def test_nobody_sees_wrong_data_when_it_is_killed(
    tmp_path: Path, engine: EngineChoice, direction: DirectionChoice, stage: Stage
) -> None:
    _, base, middle, top = chain_of(tmp_path, 4)
    for path in (middle, top):
        snapshot(path, "goes")
        qemu_io(path, "write -q -P 50 0 1M")
    before = {path: shown(path, "goes") for path in (middle, top)}
    view = content(top)
    options = MergeOptions(engine=engine, direction=direction, drop_snapshots=True)
    pid = os.fork()
    if pid == 0:

        def on_progress(progress: ProgressEvent) -> None:
            if progress.stage is stage:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            chainmerge.merge(top, base, options=options, on_progress=on_progress)
        finally:
            os._exit(1)
    os.waitpid(pid, 0)
    assert content(top) == view
    for path in (middle, top):
        assert all(shown(path, name) == before[path] for name in listed(path))
    chainmerge.merge(top, base, options=options)
    assert content(top if direction == "pull" else base) == view
    assert listed(top) == []
    assert listed(middle) == (["goes"] if direction == "pull" else [])


def test_what_fails_after_the_removal_is_no_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, top = chain_of(tmp_path, 2)
    snapshot(top, "goes")
    qemu_io(top, "write -q -P 50 0 1M")
    view = content(top)

    def refused(*_: object) -> None:
        raise ImageDirty(str(base))

    monkeypatch.setattr("chainmerge.merging.execution._decided_again", refused)
    with pytest.raises(MergeUnfinished):
        chainmerge.merge(top, options=DROP)
    assert content(top) == view
    monkeypatch.undo()
    chainmerge.merge(top)
    assert content(base) == view


# Random chains


class Image(Struct, frozen=True):
    """What is done to an image: cells that are written or zeroed, and None for a snapshot."""

    steps: tuple[tuple[int, bool] | None, ...]


class Case(Struct, frozen=True):
    images: tuple[Image, ...]
    base: int
    top: int
    options: MergeOptions


Cells = tuple[str | None, ...]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = draw(st.integers(2, 5))
    cells = st.tuples(st.integers(0, CELLS - 1), st.booleans())
    steps = st.one_of(cells, cells, st.none())
    images = tuple(
        Image(tuple(draw(st.lists(steps, min_size=1, max_size=6)))) for _ in range(count)
    )
    top = draw(st.integers(1, count - 1))
    base = draw(st.integers(0, top - 1))
    direction = draw(st.sampled_from(("commit", "pull")))
    engine = (
        draw(st.sampled_from(("native", "native", "qemu"))) if direction == "commit" else "auto"
    )
    options = MergeOptions(
        direction=direction,  # type: ignore[arg-type]
        engine=engine,  # type: ignore[arg-type]
        delete=draw(st.integers(0, 2)) == 2,
        keep_name=draw(st.integers(0, 3)) == 3,
        drop_snapshots=draw(st.booleans()),
        data=draw(st.sampled_from(("auto", "in-place"))),
    )
    return Case(images, base, top, options)


class Model:
    """The chain with a mark of its own for each cell that an image holds."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.own: list[Cells] = []
        self.snapshots: list[dict[str, Cells]] = []
        for number, image in enumerate(case.images):
            cells: list[str | None] = [None] * CELLS
            taken: dict[str, Cells] = {}
            for at, step in enumerate(image.steps):
                if step is None:
                    taken[f"s{at}"] = tuple(cells)
                else:
                    cells[step[0]] = f"{number}.{at}"
            self.own.append(tuple(cells))
            self.snapshots.append(taken)

    def over(self, below: Sequence[Cells], own: Cells) -> Cells:
        view: list[str | None] = [None] * CELLS
        for layer in (*below, own):
            view = [new if new is not None else old for old, new in zip(view, layer, strict=True)]
        return tuple(view)

    def doomed(self) -> set[int]:
        case, options = self.case, self.case.options
        pulls = options.direction == "pull"
        if options.delete:
            return set(range(case.base, case.top) if pulls else range(case.base + 1, case.top + 1))
        return {case.top} if options.keep_name and not pulls else set()

    def below_after(self, number: int) -> list[Cells]:
        """What an image stands on once the merge is done."""
        case, own = self.case, list(self.own)
        if case.options.direction == "pull":
            if number <= case.top - 1:
                return own[:number]
            return own[: case.base]
        merged = self.over(own[case.base : case.top], own[case.top])
        on_base = [*own[: case.base], merged]
        if number <= case.base:
            return own[:number]
        if number == case.top:
            return on_base
        return [*on_base, *own[case.base + 1 : number]]

    def changed(self, number: int) -> set[str]:
        if number > self.case.top:
            return set()
        return {
            name
            for name, cells in self.snapshots[number].items()
            if self.over(self.own[:number], cells) != self.over(self.below_after(number), cells)
        }


def build(directory: Path, case: Case) -> list[Path]:
    paths: list[Path] = []
    for number, image in enumerate(case.images):
        path = directory / f"{number}.qcow2"
        create(path, CELLS * CELL if not paths else None, backing=paths[-1].name if paths else None)
        for at, step in enumerate(image.steps):
            if step is None:
                snapshot(path, f"s{at}")
            else:
                cell, zero = step
                how = "-z" if zero else f"-P {number * 16 + at + 1}"
                qemu_io(path, f"write -q {how} {cell * CELL} {CELL}")
        paths.append(path)
    return paths


@settings(max_examples=40)
@given(cases())
def test_random_chains(case: Case) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        assert_snapshots_are_right(Path(scratch), case)


@pytest.mark.soak
@settings(max_examples=2000)
@given(cases())
def test_thousands_of_random_chains(case: Case) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        assert_snapshots_are_right(Path(scratch), case)


def assert_snapshots_are_right(directory: Path, case: Case) -> None:
    paths, model = build(directory, case), Model(case)
    before = {path: {name: shown(path, name) for name in listed(path)} for path in paths}
    view = content(paths[case.top])
    doomed = model.doomed()
    lost = {
        paths[number]: set(model.snapshots[number]) if number in doomed else model.changed(number)
        for number in range(len(paths))
    }
    lost = {path: names for path, names in lost.items() if names}
    note(f"lost: {lost}")
    untouched = state(directory)
    top, base, options = paths[case.top], paths[case.base], case.options
    plan = chainmerge.plan(top, base, options=options)
    assert state(directory) == untouched
    for planned in plan.snapshots:
        names = lost.get(Path(planned.image), set())
        assert set(planned.dropped if options.drop_snapshots else planned.lost) == names
        assert set(planned.kept) == before[Path(planned.image)].keys() - names
    report: MergeReport | None = None
    if lost and not options.drop_snapshots:
        codes = {one.code for one in plan.refusals}
        assert codes
        assert codes <= {"snapshots-would-change", "internal-snapshots"}
        # Where base shows what top shows already nothing changes, which only merging finds out.
        with contextlib.suppress(Refused):
            report = chainmerge.merge(top, base, options=options)
    else:
        assert plan.feasible, plan.refusals
        report = chainmerge.merge(top, base, options=options)
    if report is None:
        assert state(directory) == untouched
        event("refused")
        return
    event("dropped" if lost else "merged")
    pulls = options.direction == "pull"
    assert content(top if options.keep_name or pulls else base) == view
    now = {path: path for path in paths}
    if options.keep_name and not pulls:
        del now[top]
        now[base] = top
    for path, image in now.items():
        if not image.exists():
            continue
        assert_clean(image)
        kept = before[path].keys() - (lost.get(path, set()) if options.drop_snapshots else set())
        assert set(listed(image)) >= kept
        for name in listed(image):
            assert shown(image, name) == before[path][name], (path.name, name)
    if not (options.delete or options.keep_name or pulls):
        assert content(top) == view
