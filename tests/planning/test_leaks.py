# SPDX-License-Identifier: Apache-2.0
"""Leaked clusters: ours are given back, those of others stay, as they may be somebody's data."""

from __future__ import annotations

import os
import signal
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct
from msgspec.structs import replace

import chainmerge
from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.errors import Refused
from chainmerge.options import MergeOptions
from chainmerge.planning import leaks
from chainmerge.qcow2.check import check as checked
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.runs import runs_of, without_runs
from chainmerge.records.merge_journal import journal_file, load_journal, save_journal
from chainmerge.storage.files import FileReadable
from tests.chain.unchanged import unchanged
from tests.support.damage import leak_clusters, mark_in_use
from tests.support.qemu import assert_clean, check, content, create, qemu_img, qemu_io

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
CLUSTER = 1 << 14
DISK = 128 * MIB
"""Four L2 tables."""
LOST = 160
"""Clusters that the lost table led to."""

WAYS = {
    "commit": MergeOptions(engine="native"),
    "in place": MergeOptions(engine="native", data="in-place"),
    "pull": MergeOptions(direction="pull"),
    "by qemu": MergeOptions(engine="qemu"),
}


def _wipe(image: Path) -> None:
    """Overwrite the first L2 table with zeros."""
    with image.open("r+b") as file:
        file.seek(_first_table(image))
        file.write(bytes(CLUSTER))


def _unlink(image: Path) -> None:
    """Overwrite the first L1 entry with zeros."""
    with image.open("r+b") as file:
        file.seek(_l1(image))
        file.write(bytes(8))


def _unlink_and_wipe(image: Path) -> None:
    _wipe(image)
    _unlink(image)


def _l1(image: Path) -> int:
    with image.open("rb") as file:
        return int(struct.unpack(">Q", file.read(48)[40:])[0])


def _first_table(image: Path) -> int:
    with image.open("rb") as file:
        file.seek(_l1(image))
        return int(struct.unpack(">Q", file.read(8))[0]) & 0x00FF_FFFF_FFFF_FE00


LOSSES = {"wiped": _wipe, "unlinked": _unlink, "both": _unlink_and_wipe}


def _clusters_of(image: Path, pattern: int) -> int:
    """How many clusters of a file hold nothing but the pattern."""
    data, wanted = image.read_bytes(), bytes([pattern]) * CLUSTER
    return sum(data[at : at + CLUSTER] == wanted for at in range(0, len(data), CLUSTER))


def _leaked(image: Path) -> frozenset[int]:
    with FileReadable(image) as readable:
        leaked = checked(Qcow2Image(readable)).leaked
    return frozenset(leaked.expanded().tolist())


class Chain(Struct, frozen=True):
    """Two images, and the one of them that a merge writes to, with a table of it lost."""

    base: Path
    top: Path
    written: Path
    options: MergeOptions


def _chain(
    directory: Path, options: MergeOptions, lose: Callable[[Path], None] | None = _wipe
) -> Chain:
    base = create(directory / "base.qcow2", DISK, cluster_size=CLUSTER)
    qemu_io(base, "write -P 7 75M 1M")
    top = create(directory / "top.qcow2", backing=base.name, cluster_size=CLUSTER)
    qemu_io(top, "write -P 2 90M 2M")
    written = top if options.direction == "pull" else base
    qemu_io(written, f"write -P 1 0 {LOST * CLUSTER}")
    if lose is not None:
        lose(written)
    return Chain(base, top, written, options)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("way", WAYS)
def test_what_a_lost_table_led_to_stays(tmp_path: Path, way: str, loss: str) -> None:
    chain = _chain(tmp_path, WAYS[way], LOSSES[loss])
    before, shown = _leaked(chain.written), content(chain.top)
    plan = chainmerge.plan(chain.top, options=chain.options)
    assert plan.leaks.others == len(before) * CLUSTER
    assert plan.leaks.ours == 0
    assert plan.leaks.sign is not None
    assert not plan.leaks.reclaimed
    assert any("would destroy" in warning for warning in plan.warnings)
    report = chainmerge.merge(chain.top, options=chain.options)
    assert any("lost L2 table" in warning for warning in report.warnings)
    assert _leaked(chain.written) == before
    assert _clusters_of(chain.written, 1) == LOST
    assert check(chain.written)["corruptions"] == 0
    assert content(chain.written) == shown
    # Once more, when all is merged.
    chainmerge.merge(chain.top, options=chain.options)
    assert _leaked(chain.written) == before


@pytest.mark.parametrize("way", WAYS)
def test_asked_for_it_goes(tmp_path: Path, way: str) -> None:
    chain = _chain(tmp_path, replace(WAYS[way], reclaim=True))
    plan = chainmerge.plan(chain.top, options=chain.options)
    assert plan.leaks.reclaimed
    kept = chainmerge.plan(chain.top, options=replace(chain.options, reclaim=False))
    assert plan.space.required < kept.space.required
    chainmerge.merge(chain.top, options=chain.options)
    assert_clean(chain.written)


@pytest.mark.parametrize("way", ["commit", "pull"])
@pytest.mark.parametrize("reclaim", [False, True])
def test_the_space_is_exact(tmp_path: Path, way: str, reclaim: bool) -> None:
    """What stays counts as used, to the byte."""
    chain = _chain(tmp_path, replace(WAYS[way], reclaim=reclaim))
    qemu_io(chain.base, "write -P 7 82M 1M")
    required = chainmerge.plan(chain.top, options=chain.options).space.required
    before = chain.written.read_bytes()
    if not reclaim:
        too_small = replace(chain.options, size_limit=required - CLUSTER)
        with pytest.raises(Refused):
            chainmerge.merge(chain.top, options=too_small)
        assert chain.written.read_bytes() == before
    chainmerge.merge(chain.top, options=replace(chain.options, size_limit=required))
    assert chain.written.stat().st_size <= max(required, len(before) if reclaim else 0)


def _die_at(chain: Chain, stage: Stage) -> None:
    pid = os.fork()
    if pid == 0:

        def on_progress(event: ProgressEvent) -> None:
            if event.stage is stage and (stage is not Stage.COPY or event.done):
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            chainmerge.merge(chain.top, options=chain.options, on_progress=on_progress)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("stage", [Stage.COPY, Stage.VERIFY])
@pytest.mark.parametrize("way", WAYS)
def test_after_a_kill_ours_go_and_others_stay(
    tmp_path: Path, way: str, stage: Stage, times: int
) -> None:
    chain = _chain(tmp_path, WAYS[way])
    before, shown = _leaked(chain.written), content(chain.top)
    if way == "by qemu":
        # The second run may find all done.
        times = 1
    for _ in range(times):
        _die_at(chain, stage)
        assert _leaked(chain.written) >= before
    if stage is Stage.VERIFY and way != "by qemu":
        assert _leaked(chain.written) > before
        assert chainmerge.plan(chain.top, options=chain.options).leaks.ours
    chainmerge.merge(chain.top, options=chain.options)
    assert _leaked(chain.written) == before
    assert _clusters_of(chain.written, 1) == LOST
    assert content(chain.written) == shown
    assert chainmerge.status([chain.top]).merges == ()


@pytest.mark.parametrize("way", ["commit", "pull"])
def test_a_repair_after_a_kill_gives_back_ours_alone(tmp_path: Path, way: str) -> None:
    """Also what was reserved for the merge, and was never counted as used."""
    chain = _chain(tmp_path, WAYS[way])
    qemu_io(chain.base, "write -P 7 40M 24M")
    qemu_io(chain.top, "write -P 2 100M 24M")
    before = _leaked(chain.written), chain.written.stat().st_size, content(chain.written)
    _die_at(chain, Stage.COPY)
    assert chain.written.stat().st_size > before[1] + 16 * MIB
    remarks = chainmerge.check_image(chain.written).remarks
    assert any("unfinished" in remark for remark in remarks), remarks
    if way == "commit":
        assert any("reserved" in remark for remark in remarks), remarks
    planned = chainmerge.plan_repair(chain.written)
    assert any("reserved" in action for action in planned.actions), planned.actions
    report = chainmerge.repair(chain.written)
    assert report.actions == planned.actions
    assert (
        _leaked(chain.written),
        chain.written.stat().st_size,
        content(chain.written),
    ) == before
    assert chain.written.stat().st_blocks * 512 <= before[1] + MIB
    assert chainmerge.status([chain.written]).merges == ()


def test_without_a_place_for_the_backup_nothing_is_given_back(tmp_path: Path) -> None:
    chain = _chain(tmp_path, WAYS["commit"])
    _die_at(chain, Stage.VERIFY)
    with unchanged(tmp_path), pytest.raises(chainmerge.ChainmergeError) as caught:
        chainmerge.repair(chain.base, backup_directory=tmp_path / "nowhere")
    assert caught.value.exit_code == 3


def test_a_journal_that_says_nothing_of_leaks(tmp_path: Path) -> None:
    """One of an earlier version: nobody can tell whose they are, so all of them stay."""
    chain = _chain(tmp_path, WAYS["commit"])
    _die_at(chain, Stage.VERIFY)
    journal = load_journal(chain.base)
    assert journal is not None
    save_journal(msgspec.structs.replace(journal, leaked_before=None))
    before = _leaked(chain.base)
    chainmerge.merge(chain.top, options=chain.options)
    assert _leaked(chain.base) == before


def test_another_image_under_the_name_has_leaks_of_its_own(tmp_path: Path) -> None:
    chain = _chain(tmp_path, WAYS["commit"])
    _die_at(chain, Stage.VERIFY)
    restored = tmp_path / "restored"
    restored.write_bytes(chain.base.read_bytes())
    restored.replace(chain.base)
    before = _leaked(chain.base)
    assert journal_file(chain.base).exists()
    assert chainmerge.plan(chain.top, options=chain.options).leaks.ours == 0
    chainmerge.merge(chain.top, options=chain.options)
    assert _leaked(chain.base) == before


# Repair


@pytest.mark.parametrize("loss", LOSSES)
def test_repair_shows_and_keeps_what_may_be_data(tmp_path: Path, loss: str) -> None:
    chain = _chain(tmp_path, WAYS["commit"], LOSSES[loss])
    image, before = chain.base, _leaked(chain.base)
    planned = chainmerge.plan_repair(image)
    assert "--reclaim" in planned.findings[-1].sentence
    assert planned.actions == ()
    report = chainmerge.repair(image)
    # That clusters are leaked and hold data is no proof; a table of zeros is.
    assert report.leaves_damage == (loss != "both")
    assert _leaked(image) == before
    assert _clusters_of(image, 1) == LOST
    chainmerge.repair(image, reclaim=True)
    assert_clean(image)


def test_new_refcounts_keep_them_too(tmp_path: Path) -> None:
    chain = _chain(tmp_path, WAYS["commit"])
    before = _leaked(chain.base)
    with chain.base.open("r+b") as file:
        file.seek(_l1(chain.base) + 16)
        entry = struct.unpack(">Q", file.read(8))[0]
        file.seek(_l1(chain.base) + 16)
        file.write(struct.pack(">Q", entry & ~(1 << 63)))
    assert check(chain.base)["corruptions"]
    report = chainmerge.repair(chain.base)
    assert any("new refcounts" in action for action in report.actions)
    assert check(chain.base)["corruptions"] == 0
    assert _leaked(chain.base) == before
    assert _clusters_of(chain.base, 1) == LOST


def test_clusters_that_hold_nothing_are_reclaimed(tmp_path: Path) -> None:
    image = create(tmp_path / "disk.qcow2", DISK)
    leak_clusters(image, 64)
    assert chainmerge.repair(image).actions == ("reclaim 64 leaked clusters",)
    assert_clean(image)


def test_a_missing_backing_file_is_damage(tmp_path: Path) -> None:
    chain = _chain(tmp_path, WAYS["commit"], None)
    chain.base.rename(tmp_path / "elsewhere")
    report = chainmerge.plan_repair(chain.top)
    assert [finding.kind for finding in report.findings] == ["backing-file-missing"]
    assert report.leaves_damage


# Check


def test_check_tells_of_bitmaps_that_are_in_use(tmp_path: Path) -> None:
    image = create(tmp_path / "disk.qcow2", 16 * MIB)
    qemu_img("bitmap", "--add", image, "cp")
    assert chainmerge.check_image(image).clean
    mark_in_use(image, "cp")
    result = chainmerge.check_image(image)
    assert not result.clean
    assert "'cp'" in result.remarks[0]


@pytest.mark.parametrize("bit", [0, 1])
def test_check_tells_of_marks(tmp_path: Path, bit: int) -> None:
    image = create(tmp_path / "disk.qcow2", 16 * MIB)
    with image.open("r+b") as file:
        file.seek(72)
        file.write(struct.pack(">Q", 1 << bit))
    assert chainmerge.check_image(image).remarks


@pytest.mark.parametrize("way", WAYS)
def test_check_tells_of_an_unfinished_merge(tmp_path: Path, way: str) -> None:
    chain = _chain(tmp_path, WAYS[way], None)
    _die_at(chain, Stage.VERIFY)
    for image in (chain.base, chain.top):
        assert any("is unfinished" in one for one in chainmerge.check_image(image).remarks)
    chainmerge.merge(chain.top, options=chain.options)
    assert chainmerge.check_image(chain.written).clean


# Notes


@given(clusters=st.sets(st.integers(0, 400), max_size=200), most=st.integers(2, 12))
def test_a_note_has_all_of_them_in_few_ranges(clusters: set[int], most: int) -> None:
    runs = runs_of(sorted(clusters))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leaks, "_MOST_NOTED", most)
        note = leaks.to_note(runs)
    assert len(note) <= most
    noted = leaks.from_note(note)
    assert without_runs(runs, noted).total == 0
    if len(runs.start) <= most:
        assert noted.expanded().tolist() == sorted(clusters)


@given(note=st.lists(st.tuples(st.integers(), st.integers()), max_size=8))
def test_any_note_makes_sense(note: list[tuple[int, int]]) -> None:
    runs = leaks.from_note(note)
    assert (runs.length > 0).all()
    assert (runs.start[1:] > runs.end[:-1]).all()
