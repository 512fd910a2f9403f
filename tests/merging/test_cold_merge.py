# SPDX-License-Identifier: Apache-2.0
"""What a merge does to images, judged by QEMU's own tools."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import pytest

import chainmerge
from chainmerge.chain.errors import BaseNotBelowTop, NoBackingFile, NotInChain
from chainmerge.documents.merge import MergeOutcome
from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.options import (
    Access,
    DataChoice,
    DirectionChoice,
    EngineChoice,
    MergeOptions,
)
from chainmerge.planning.errors import (
    BaseCannotHoldBitmaps,
    BaseHasOtherChildren,
    CheckpointOfOthers,
    ChildSeesMore,
    DoomedInUse,
    MiddleHasOtherChildren,
)
from tests.chain.unchanged import unchanged
from tests.support.merge_scenario import MIB, Scenario, dirty_granules
from tests.support.qemu import (
    assert_clean,
    bitmap_names,
    check,
    content,
    create,
    dirty_ranges,
    info,
    qemu_img,
    qemu_io,
)

if TYPE_CHECKING:
    from pathlib import Path


def _chain(directory: Path, *sizes: int | None, base_format: str = "qcow2") -> list[Path]:
    """A chain of 0.img <- 1.img <- ..., each with a write of its own at megabyte = index."""
    images: list[Path] = []
    for index, size in enumerate(sizes):
        path = directory / f"{index}.img"
        if index == 0:
            create(path, size or 8 * MIB, fmt=base_format)
        else:
            backing_format = base_format if index == 1 else "qcow2"
            create(path, size, backing=images[-1].name, backing_format=backing_format)
        qemu_io(
            path, f"write -P {index + 1} {index}M 1M", fmt=base_format if index == 0 else "qcow2"
        )
        images.append(path)
    return images


def test_merges_data_and_bitmaps(scenario: Scenario) -> None:
    report = chainmerge.merge(scenario.top)
    assert report.outcome is MergeOutcome.MERGED
    scenario.assert_merged()
    assert_clean(scenario.base)
    assert set(bitmap_names(scenario.base)) == set(scenario.expected_bits)


def test_top_is_left_as_it_was(scenario: Scenario) -> None:
    before = scenario.top.read_bytes()
    chainmerge.merge(scenario.top)
    assert scenario.top.read_bytes() == before
    assert content(scenario.top) == scenario.expected_content


def test_bits_are_exact(tmp_path: Path) -> None:
    """256 writes of 4 KiB are 1 MiB dirty, not 256 clusters of 64 KiB."""
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    create(base, 512 * MIB)
    qemu_img("bitmap", "--add", "-g", "4096", base, "cp")
    create(top, backing="base.qcow2")
    qemu_img("bitmap", "--add", "-g", "4096", top, "cp")
    qemu_io(top, *(f"write -P 7 {number}M 4k" for number in range(256)))
    chainmerge.merge(top)
    ranges = dirty_ranges(base, "cp")
    assert sum(run.length for run in ranges) == MIB
    assert [run.start for run in ranges] == [number * MIB for number in range(256)]


def test_range_is_merged_in_one_pass(tmp_path: Path) -> None:
    images = _chain(tmp_path, 8 * MIB, None, None, None)
    qemu_img("bitmap", "--add", images[-1], "only-in-top")
    expected = content(images[-1])
    report = chainmerge.merge(images[-1], base=images[0])
    assert content(images[0]) == expected
    assert content(images[-1]) == expected
    assert info(images[-1])["backing-filename"] == "0.img"
    assert any("must not be used" in warning for warning in report.warnings)
    again = chainmerge.merge(images[-1], base=images[0])
    assert again.outcome is MergeOutcome.ALREADY_MERGED
    assert bitmap_names(images[0])["only-in-top"]["flags"] == ["auto"]


def test_internal_merge_repoints_the_children(tmp_path: Path) -> None:
    images = _chain(tmp_path, 8 * MIB, None, None)
    other = create(tmp_path / "other.img", backing=str(images[1]))
    expected = [content(images[2]), content(other)]
    report = chainmerge.merge(images[1])
    assert set(report.repointed) == {str(images[2]), str(other)}
    assert info(images[2])["backing-filename"] == "0.img"
    assert info(other)["backing-filename"] == str(images[0])
    assert [content(images[2]), content(other)] == expected


def test_delete(tmp_path: Path) -> None:
    images = _chain(tmp_path, 8 * MIB, None, None)
    expected = content(images[2])
    report = chainmerge.merge(images[2], base=images[0], options=MergeOptions(delete=True))
    assert set(report.deleted) == {str(images[1]), str(images[2])}
    assert not images[1].exists()
    assert not images[2].exists()
    assert content(images[0]) == expected
    again = chainmerge.merge(images[2], base=images[0], options=MergeOptions(delete=True))
    assert again.outcome is MergeOutcome.ALREADY_MERGED


def test_keep_name(tmp_path: Path) -> None:
    images = _chain(tmp_path, 8 * MIB, None, None, None)
    expected = content(images[3])
    options = MergeOptions(keep_name=True)
    report = chainmerge.merge(images[2], options=options)
    assert report.renamed == (str(images[1]), str(images[2]))
    assert not images[1].exists()
    assert info(images[2])["backing-filename"] == "0.img"
    assert content(images[3]) == expected
    again = chainmerge.merge(images[2], options=options)
    assert again.outcome is MergeOutcome.ALREADY_MERGED
    assert images[0].exists()
    assert content(images[3]) == expected


def test_keep_name_into_another_directory(tmp_path: Path) -> None:
    lower = tmp_path / "lower"
    lower.mkdir()
    images = _chain(lower, 8 * MIB, None)
    top = create(tmp_path / "top.img", backing=str(images[1]))
    qemu_io(top, "write -P 9 5M 1M")
    expected = content(top)
    access = Access(allow_backing=(str(lower),), sole_user=True)
    chainmerge.merge(top, access=access, options=MergeOptions(keep_name=True))
    assert content(top) == expected
    assert not images[1].exists()


def test_raw_base(tmp_path: Path) -> None:
    images = _chain(tmp_path, 8 * MIB, None, base_format="raw")
    expected = content(images[1])
    chainmerge.merge(images[1])
    assert content(images[0], "raw") == expected


@pytest.mark.parametrize("base_format", ["raw", "v2"])
def test_base_that_cannot_hold_bitmaps(tmp_path: Path, base_format: str) -> None:
    base, top = tmp_path / "base.img", tmp_path / "top.img"
    if base_format == "raw":
        create(base, 8 * MIB, fmt="raw")
    else:
        create(base, 8 * MIB, compat="0.10")
    create(top, backing="base.img", backing_format="raw" if base_format == "raw" else "qcow2")
    qemu_img("bitmap", "--add", top, "cp")
    qemu_io(top, "write -P 3 0 1M")
    before = base.read_bytes(), top.read_bytes()
    with pytest.raises(BaseCannotHoldBitmaps, match="cp"):
        chainmerge.merge(top)
    assert (base.read_bytes(), top.read_bytes()) == before
    expected = content(top)
    chainmerge.merge(top, options=MergeOptions(drop_bitmaps=True, delete=True))
    assert content(base, "raw" if base_format == "raw" else "qcow2") == expected


def test_top_larger_than_base_and_base_shorter_than_its_backing_file(tmp_path: Path) -> None:
    """The area by which base grows must not show what its longer backing file has there."""
    images = _chain(tmp_path, 8 * MIB, 4 * MIB, 8 * MIB)
    qemu_io(images[0], "write -P 99 4M 4M")
    expected = content(images[2])
    assert expected[5 * MIB] == 0
    chainmerge.merge(images[2])
    assert content(images[1]) == expected


def test_middle_shorter_than_base(tmp_path: Path) -> None:
    """What base has beyond the end of a shorter image in between is hidden by it."""
    images = _chain(tmp_path, 8 * MIB, 4 * MIB, 8 * MIB)
    qemu_io(images[0], "write -P 99 5M 2M")
    expected = content(images[2])
    assert expected[6 * MIB] == 0
    chainmerge.merge(images[2], base=images[0])
    assert content(images[0]) == expected


def test_bitmaps_of_a_base_that_grows(tmp_path: Path) -> None:
    images = _chain(tmp_path, 4 * MIB, 8 * MIB)
    for image in images:
        qemu_img("bitmap", "--add", image, "cp")
    qemu_io(images[1], "write -P 5 7M 1M")
    chainmerge.merge(images[1])
    assert dirty_granules(images[0], "cp") == set(range(7 * 16, 8 * 16))


def test_child_larger_than_top_is_refused(tmp_path: Path) -> None:
    images = _chain(tmp_path, 8 * MIB, 4 * MIB, 8 * MIB)
    with pytest.raises(ChildSeesMore):
        chainmerge.merge(images[1])


def test_other_child_of_base_is_refused(tmp_path: Path) -> None:
    images = _chain(tmp_path, 8 * MIB, None)
    create(tmp_path / "other.img", backing="0.img")
    with pytest.raises(BaseHasOtherChildren, match=r"other\.img"):
        chainmerge.merge(images[1])
    plan = chainmerge.plan(images[1])
    assert [finding.code for finding in plan.refusals] == ["base-has-other-children"]


def test_other_child_of_a_middle_image_is_refused(tmp_path: Path) -> None:
    images = _chain(tmp_path, 8 * MIB, None, None)
    create(tmp_path / "other.img", backing="1.img")
    with pytest.raises(MiddleHasOtherChildren, match=r"other\.img"):
        chainmerge.merge(images[2], base=images[0])


def test_wrong_order(tmp_path: Path) -> None:
    images = _chain(tmp_path, 8 * MIB, None, None)
    with pytest.raises(NotInChain):
        chainmerge.merge(images[1], base=images[2])
    with pytest.raises(BaseNotBelowTop):
        chainmerge.merge(images[1], base=images[1])
    with pytest.raises(NoBackingFile):
        chainmerge.merge(images[0])


def test_names_of_files_and_bitmaps_can_be_anything(tmp_path: Path) -> None:
    directory = tmp_path / "dir with 'quotes', commas,=and \n lines"
    directory.mkdir()
    base = create(directory / "-base,file=x.qcow2", 8 * MIB)
    top = create(directory / "json top.qcow2", backing=f"./{base.name}")
    awkward = ["-starts-with-dash", 'has "quotes" and \\', "x" * 1023, "ümläut \U0001f4be"]
    for name in awkward:
        chainmerge.bitmaps_add(top, name)
    qemu_io(top, "write -P 3 0 1M")
    expected = content(top)
    chainmerge.merge(top)
    assert content(base) == expected
    assert set(bitmap_names(base)) == set(awkward)


def test_lazy_refcounts_base_survives_a_killed_copy(tmp_path: Path) -> None:
    """A writer with lazy refcounts sets the dirty bit; a kill must not leave it so."""
    base = create(tmp_path / "base.qcow2", 8 * MIB, lazy_refcounts="on")
    top = create(tmp_path / "top.qcow2", backing=base.name)
    qemu_io(top, "write -P 3 0 4M")
    seen: list[int] = []

    def look(event: ProgressEvent) -> None:
        if event.stage is Stage.COPY and event.total:
            seen.append(base.read_bytes()[79] & 1)

    chainmerge.merge(top, on_progress=look)
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("direction", ["commit", "pull"])
def test_reading_back_is_a_stage_of_its_own(tmp_path: Path, direction: DirectionChoice) -> None:
    base = create(tmp_path / "base.qcow2", 8 * MIB)
    qemu_io(base, "write -P 4 5M 2M")
    top = create(tmp_path / "top.qcow2", backing=base.name)
    qemu_io(top, "write -P 3 0 4M")
    events: list[ProgressEvent] = []
    report = chainmerge.merge(
        top, options=MergeOptions(direction=direction), on_progress=events.append
    )
    assert report.plan is not None
    stages = list(dict.fromkeys(event.stage for event in events))
    at = stages.index(Stage.COPY)
    # What a file system shares is not read back: nothing was written.
    expected = [Stage.COPY, Stage.VERIFY]
    if not report.plan.shared_bytes:
        expected.insert(1, Stage.READ_BACK)
    assert stages[at : at + len(expected)] == expected
    read = [event for event in events if event.stage is Stage.READ_BACK]
    moved = {"commit": 4 * MIB, "pull": 2 * MIB}[direction]
    if read:
        assert {event.total for event in read} == {moved}
        assert (read[0].done, read[-1].done) == (0, moved)
    assert 0 < report.copy_seconds < report.seconds


def test_what_is_not_read_back_is_not_said_to_be(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2", 8 * MIB)
    top = create(tmp_path / "top.qcow2", backing=base.name)
    qemu_io(top, "write -P 3 0 4M")
    stages: list[Stage] = []
    chainmerge.merge(
        top,
        options=MergeOptions(verify="metadata"),
        on_progress=lambda event: stages.append(event.stage),
    )
    assert Stage.COPY in stages
    assert Stage.READ_BACK not in stages


@pytest.mark.parametrize("direction", ["commit", "pull"])
def test_what_has_tops_name_has_tops_mode(scenario: Scenario, direction: DirectionChoice) -> None:
    scenario.base.chmod(0o640)
    scenario.top.chmod(0o600)
    options = MergeOptions(keep_name=True, direction=direction)
    chainmerge.merge(scenario.top, options=options)
    assert scenario.top.stat().st_mode & 0o777 == 0o600
    assert scenario.base.exists() == (direction == "pull")


def test_pull_with_another_image_on_base(scenario: Scenario) -> None:
    """A pull leaves base as it is, so that what else stands on it does not matter."""
    sibling = create(scenario.directory / "sibling.qcow2", backing="base.qcow2")
    qemu_io(sibling, "write -P 99 5M 1M")
    before = content(sibling), scenario.base.read_bytes()
    with pytest.raises(BaseHasOtherChildren):
        chainmerge.merge(scenario.top)
    for _ in range(2):
        report = chainmerge.merge(scenario.top, options=MergeOptions(direction="pull"))
        assert (content(sibling), scenario.base.read_bytes()) == before
        assert content(scenario.top) == scenario.expected_content
        assert "backing-filename" not in info(scenario.top)
    assert report.outcome is MergeOutcome.ALREADY_MERGED
    for name, bits in scenario.expected_bits.items():
        assert dirty_granules(scenario.top, name) == bits, name
    other = create(scenario.directory / "other.qcow2", backing="base.qcow2")
    with pytest.raises(DoomedInUse):
        chainmerge.merge(other, options=MergeOptions(direction="pull", delete=True))


def test_keep_name_moves_less_where_it_can(scenario: Scenario) -> None:
    """Base holds less that top lacks than top holds."""
    report = chainmerge.merge(scenario.top, options=MergeOptions(keep_name=True))
    assert report.plan is not None
    assert report.plan.directions.chosen == "pull"
    assert report.bytes_copied == report.plan.directions.pull.bytes_to_copy
    assert report.deleted == ()
    assert any("--delete" in warning for warning in report.warnings)
    assert content(scenario.top) == scenario.expected_content


@pytest.mark.parametrize("direction", ["commit", "pull"])
@pytest.mark.parametrize("delete", [True, False])
def test_keep_name_deletes_nothing_of_itself(
    tmp_path: Path, direction: DirectionChoice, delete: bool
) -> None:
    """A commit has one file less: base takes the place of top's. All else takes --delete."""
    images = _chain(tmp_path, 8 * MIB, None, None)
    expected = content(images[2])
    options = MergeOptions(keep_name=True, delete=delete, direction=direction)
    plan = chainmerge.plan(images[2], images[0], options=options)
    report = chainmerge.merge(images[2], images[0], options=options)
    assert content(images[2]) == expected
    staying = {"commit": images[1:], "pull": images}[direction]
    left = [images[2]] if delete else staying
    assert sorted(tmp_path.glob("*.img")) == left
    gone = set(images) - set(left) - ({images[0]} if direction == "commit" else set())
    assert set(report.deleted) == set(plan.delete) == {str(path) for path in gone}
    assert (report.renamed is None) == (direction == "pull")
    again = chainmerge.merge(images[2], images[0], options=options)
    assert again.outcome is MergeOutcome.ALREADY_MERGED


@pytest.mark.parametrize("between", [0, 1, 3])
def test_the_cost_of_a_pull_counts_what_is_between(tmp_path: Path, between: int) -> None:
    """What it moves is what top lacks, whichever image below has it."""
    images = [create(tmp_path / "base.qcow2", 64 * MIB)]
    qemu_io(images[0], "write -P 1 0 1M")
    for number in range(between):
        images.append(create(tmp_path / f"{number}.qcow2", backing=images[-1].name))
        # Each writes some of what the one below has, and zeros over some of base's.
        qemu_io(images[-1], f"write -P 2 {4 + 6 * number}M 8M", "write -z 0 256k")
    top = create(tmp_path / "top.qcow2", backing=images[-1].name)
    qemu_io(top, "write -P 9 6M 2M", "write -P 9 40M 4M")
    expected = content(top)
    options = MergeOptions(keep_name=True)
    plan = chainmerge.plan(top, images[0], options=options)
    costs = plan.directions
    cheaper = "pull" if costs.pull.bytes_to_copy < costs.commit.bytes_to_copy else "commit"
    assert costs.chosen == cheaper
    pull = MergeOptions(direction="pull")
    report = chainmerge.merge(top, images[0], options=pull)
    assert report.bytes_copied == costs.pull.bytes_to_copy
    assert content(top) == expected


def test_zeros_that_are_stored_as_data(tmp_path: Path) -> None:
    """They take no cluster in base, and none in the plan, if somebody asks to look for them."""
    base = create(tmp_path / "base.qcow2", 64 * MIB)
    qemu_io(base, "write -P 1 0 4M")
    top = create(tmp_path / "top.qcow2", backing="base.qcow2")
    qemu_io(top, "write -P 0 1M 8M", "write -P 2 20M 1M", "write -P 0 63M 1M")
    expected = content(top)
    plain = chainmerge.plan(top)
    options = MergeOptions(detect_zeroes=True)
    looked = chainmerge.plan(top, options=options)
    assert plain.movement.new_clusters == 10 * 16
    assert looked.movement.new_clusters == 16
    report = chainmerge.merge(top, options=options)
    assert report.bytes_copied == MIB
    assert content(base) == expected
    assert base.stat().st_size == looked.space.required
    assert_clean(base)


@pytest.mark.parametrize("data", ["cow", "in-place"])
def test_a_file_ends_where_its_image_does(tmp_path: Path, data: DataChoice) -> None:
    base = create(tmp_path / "base.qcow2", 64 * MIB)
    qemu_io(base, "write -P 1 0 4M", "write -P 2 20M 8M")
    top = create(tmp_path / "top.qcow2", backing="base.qcow2")
    qemu_io(top, "write -P 3 0 4M", "discard 20M 8M")
    expected = content(top)
    report = chainmerge.merge(top, options=MergeOptions(data=data))
    assert content(base) == expected
    assert base.stat().st_size == report.image_end == check(base)["image-end-offset"]


def test_a_range_that_is_merged_once_more_is_not_copied_again(tmp_path: Path) -> None:
    """Not even where there is a bitmap by now that base does not have."""
    base = create(tmp_path / "base.qcow2", 16 << 20)
    middle = create(tmp_path / "middle.qcow2", backing=base.name)
    top = create(tmp_path / "top.qcow2", backing=middle.name)
    for image in (middle, top):
        qemu_img("bitmap", "--add", image, "cp")
    qemu_io(top, "write -P 3 0 8M")
    qemu_img("bitmap", "--disable", top, "cp")
    expected = content(top)
    assert chainmerge.merge(top, base).bytes_copied > 0
    # What was between stands on base, as if an interrupted run had re-pointed it.
    assert chainmerge.merge(top, base).outcome is MergeOutcome.ALREADY_MERGED
    assert not bitmap_names(base)
    qemu_img("bitmap", "--add", top, "new")
    before = base.stat().st_size
    again = chainmerge.merge(top, base)
    assert again.bytes_copied == 0
    assert bitmap_names(base).keys() == {"new"}
    assert base.stat().st_size <= before + (1 << 20)
    assert content(base) == expected
    assert chainmerge.merge(top, base).outcome is MergeOutcome.ALREADY_MERGED


def test_zeros_that_were_stored_are_merged_once(tmp_path: Path) -> None:
    """Base has no clusters for them: nothing is below it, so they read as zeros without."""
    base = create(tmp_path / "base.qcow2", 16 << 20)
    middle = create(tmp_path / "middle.qcow2", backing=base.name)
    top = create(tmp_path / "top.qcow2", backing=middle.name)
    qemu_io(top, "write -P 0 0 1M", "write -P 3 8M 1M")
    options = MergeOptions(detect_zeroes=True)
    assert chainmerge.merge(top, base, options=options).outcome is MergeOutcome.MERGED
    assert chainmerge.merge(top, base, options=options).outcome is MergeOutcome.ALREADY_MERGED


def test_a_tombstone_stays_for_an_image_that_is_two_levels_up(tmp_path: Path) -> None:
    """The child of top is on base by now. What stands on it has a checkpoint that is broken."""
    base = create(tmp_path / "base.qcow2", 16 << 20)
    top = create(tmp_path / "top.qcow2", backing=base.name)
    child = create(tmp_path / "child.qcow2", backing=top.name)
    leaf = create(tmp_path / "leaf.qcow2", backing=child.name)
    for image in (base, leaf):
        qemu_img("bitmap", "--add", image, "cp")
    qemu_io(top, "write -P 3 0 1M")
    for outcome in (MergeOutcome.MERGED, MergeOutcome.ALREADY_MERGED):
        report = chainmerge.merge(top)
        assert report.outcome is outcome
        assert [(bitmap.name, bitmap.tombstone) for bitmap in report.bitmaps] == [("cp", True)]


@pytest.fixture
def branches(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base with a checkpoint that only the second image on it has, and what is on it."""
    base = create(tmp_path / "base.qcow2", 16 << 20)
    qemu_img("bitmap", "--add", base, "cp")
    qemu_io(base, "write -P 1 1M 64k")
    top = create(tmp_path / "top.qcow2", backing=base.name)
    other = create(tmp_path / "other.qcow2", backing=base.name)
    qemu_img("bitmap", "--add", other, "cp")
    return base, top, other


@pytest.mark.parametrize("engine", ["native", "qemu"])
def test_an_empty_overlay_does_not_cost_another_one_its_checkpoint(
    branches: tuple[Path, Path, Path], engine: Literal["native", "qemu"]
) -> None:
    """Base's content is what top shows, so the other image would see no difference."""
    base, top, other = branches
    with unchanged(base.parent), pytest.raises(CheckpointOfOthers, match=str(other)):
        chainmerge.merge(top, options=MergeOptions(engine=engine))


def test_prune_leaves_what_another_branch_can_use(branches: tuple[Path, Path, Path]) -> None:
    base, top, other = branches
    report = chainmerge.prune(top)
    assert (report.removed, report.kept) == ((), ("cp",))
    assert dirty_granules(base, "cp")
    qemu_img("bitmap", "--remove", other, "cp")
    assert [pruned.name for pruned in chainmerge.prune(top).removed] == ["cp"]


@pytest.mark.parametrize("engine", ["native", "qemu"])
@pytest.mark.parametrize("named", [True, False])
def test_base_named_as_what_the_guest_writes_to(
    tmp_path: Path, engine: EngineChoice, named: bool
) -> None:
    """As after a live merge; whoever plans, measures, merges or verifies finds the same chain."""
    images = _chain(tmp_path, 8 * MIB, None, None)
    base, top = images[1], images[2]
    expected = content(top)
    access, options = Access(active=str(base)), MergeOptions(engine=engine)
    name = base if named else None
    plan = chainmerge.plan(top, name, access, options)
    assert plan.feasible
    assert chainmerge.measure(top, name, access, options).required == plan.space.required
    assert chainmerge.merge(top, name, access, options).outcome is MergeOutcome.MERGED
    assert content(base) == expected
    again = chainmerge.merge(top, name, access, options)
    assert again.outcome is MergeOutcome.ALREADY_MERGED
