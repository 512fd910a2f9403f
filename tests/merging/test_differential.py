# SPDX-License-Identifier: Apache-2.0
"""Random chains, merged: content as QEMU read it before, bitmaps as a model of their own has them.

Of a third of the chains base lies on a block device of exactly the planned size.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import event, given, note, settings
from hypothesis import strategies as st
from msgspec import Struct
from msgspec.structs import replace

import chainmerge
from chainmerge.documents.merge import MergeOutcome
from chainmerge.documents.plan import MergePlan
from chainmerge.errors import Refused
from chainmerge.options import Access, MergeOptions
from chainmerge.planning.space.errors import CannotGrowBase
from chainmerge.qcow2.bitmaps import read_bits, read_directory
from tests.chain.unchanged import state
from tests.support import qemu
from tests.support.images import MIB, SECTOR, WriteCompressed, apply_writes, open_qcow2
from tests.support.loopdev import loop_device
from tests.support.merge_cases import BuiltCase, MergeCase, build, merge_cases
from tests.support.merge_model import (
    ExpectedBitmap,
    Sectors,
    disk_after,
    end_may_be_stuck,
    expected_bitmaps,
    expected_refusals,
    spent_tombstones,
)
from tests.support.surgery import clear_autoclear_features

BLOCK = 4096

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.documents.merge import MergeReport


@given(merge_cases("native"))
def test_random_merges(case: MergeCase) -> None:
    assert_does_what_it_should(case)


@pytest.mark.soak
@settings(max_examples=2000)
@given(merge_cases("native"))
def test_thousands_of_random_merges(case: MergeCase) -> None:
    assert_does_what_it_should(case)


@pytest.mark.soak
@settings(max_examples=250)
@given(merge_cases("native", st.just(True)))
def test_hundreds_of_random_merges_on_devices_of_the_exact_size(case: MergeCase) -> None:
    assert_does_what_it_should(case)


@settings(max_examples=12)
@given(merge_cases("qemu"))
def test_random_merges_by_qemu(case: MergeCase) -> None:
    assert_does_what_it_should(case)


def assert_does_what_it_should(case: MergeCase) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        built = build(Path(scratch), case)
        if "snapshots-would-change" in {refusal.code for refusal in plan(built).refusals}:
            # Which ones would, test_internal_snapshots.py has a model for.
            event("snapshots dropped")
            case = replace(case, options=replace(case.options, drop_snapshots=True))
            built = replace(built, case=case)
        refusals = expected_refusals(case)
        if end_may_be_stuck(case):
            refusals |= {"cannot-grow-base"} & {refusal.code for refusal in plan(built).refusals}
        if refusals:
            event(f"refused: {', '.join(sorted(refusals))}")
            assert_refused(built, refusals)
        elif case.on_device and not case.result.untrusted:
            event("merged on a block device")
            with on_exact_device(built):
                assert_merges(built)
        else:
            event("merged in a file")
            assert_merges(built)


def plan(built: BuiltCase) -> MergePlan:
    return chainmerge.plan(built.top, built.base, _access(built), built.case.options)


def merge(built: BuiltCase) -> MergeReport:
    return chainmerge.merge(built.top, built.base, _access(built), built.case.options)


def _access(built: BuiltCase) -> Access:
    links = [path for path in (built.base, built.top) if path.is_symlink()]
    allowed = tuple(os.path.realpath(path) for path in links)
    return Access(allow_backing=allowed, sole_user=bool(links))


def everything(built: BuiltCase) -> dict[str, object]:
    """All that the images are, on whatever they lie."""
    found: dict[str, object] = {**state(built.directory)}
    for path in built.paths:
        found[f"content of {path}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def assert_refused(built: BuiltCase, codes: set[str]) -> None:
    before = everything(built)
    assert {refusal.code for refusal in plan(built).refusals} == codes
    with pytest.raises(Refused) as caught:
        merge(built)
    assert caught.value.code in codes
    assert everything(built) == before


@contextlib.contextmanager
def on_exact_device(built: BuiltCase) -> Iterator[None]:
    """Put what is written on a device of the size that the plan asks for.

    Before that, try a smaller one.
    """
    required = least_required(built)
    # Not beside the images: it would be found there as one of them.
    (built.directory / "devices").mkdir()
    behind = built.directory / "devices" / "behind"
    base = built.case.result
    size = -(-required // SECTOR) * SECTOR
    if base.geometry is None:
        used, step = base.disk_size, SECTOR
    else:
        used, step = qemu.check(built.written)["image-end-offset"], base.geometry.cluster_size
    # Where there is nothing to do, there is nothing to refuse either.
    idle = _content_of_base(built, built.base).startswith(qemu.content(built.top))
    built.written.rename(behind)
    if size - step >= used and (built.case.pulls or not idle):
        with _in_place_of(built.written, behind, size - step):
            assert least_required(built) == required
            kind = "raw-device-too-small" if base.geometry is None else "device-too-small"
            assert_refused(built, {kind})
    os.truncate(behind, used)
    if base.geometry is not None:
        # What an earlier user of the device has left there.
        with behind.open("ab") as file:
            file.write(b"\xa5" * (size - used))
    with _in_place_of(built.written, behind, size):
        assert least_required(built) == required
        yield


def least_required(built: BuiltCase) -> int:
    space = plan(built).space
    return space.required_by_placement[space.placement]


@contextlib.contextmanager
def _in_place_of(path: Path, behind: Path, size: int) -> Iterator[None]:
    with loop_device(behind, size) as device:
        path.symlink_to(device)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


class Bitmap(Struct, frozen=True):
    """A bitmap as our parser reads it from an image; of an unreadable one nothing is dirty."""

    flags: int
    granularity: int
    dirty: bytes


class Before(Struct, frozen=True):
    """What must be the same after the merge."""

    view: bytes
    old_base: bytes
    above: list[bytes]
    bitmaps_above: list[dict[str, Bitmap]]
    leaks_above: list[int]
    below: list[bytes]
    merged: list[bytes]
    top_file: bytes
    snapshots: dict[Path, bytes]
    plan: MergePlan

    @property
    def rewritten(self) -> set[str]:
        """Images that snapshots are removed from."""
        return {one.image for one in self.plan.snapshots if one.dropped}


def look(built: BuiltCase) -> Before:
    untouched = everything(built)
    before = Before(
        view=qemu.content(built.top),
        old_base=_content_of_base(built, built.base),
        above=[qemu.content(path) for path in built.above],
        bitmaps_above=[_bitmaps(path) for path in built.above],
        leaks_above=[qemu.check(path)["leaks"] for path in built.above],
        below=[path.read_bytes() for path in built.below],
        merged=[path.read_bytes() for path in built.paths[built.case.base : built.case.top]],
        top_file=built.top.read_bytes(),
        snapshots={path: _snapshot(path) for path in _holders(built)},
        plan=plan(built),
    )
    assert everything(built) == untouched
    return before


def assert_merges(built: BuiltCase) -> None:
    before = look(built)
    assert before.plan.refusals == ()
    report = merge(built)
    if report.outcome is MergeOutcome.ALREADY_MERGED:
        assert not built.case.pulls
        # Top has nothing that base did not have.
        assert before.old_base[: len(before.view)] == before.view
    assert_merged(built, before)
    if built.case.twice:
        # What was between base and top stands on base now, as if a run had been interrupted.
        assert merge(built).outcome is MergeOutcome.ALREADY_MERGED
        assert_merged(built, before)


def assert_merged(built: BuiltCase, before: Before) -> None:
    renamed = built.case.options.keep_name or built.case.pulls
    result = built.top if renamed else built.base
    assert_content(built, before, result)
    assert_children(built, before)
    assert_bitmaps(built, result)
    assert_files(built, before, result)
    assert_snapshots(built, before, result)


def assert_content(built: BuiltCase, before: Before, result: Path) -> None:
    content = qemu.content(result, built.case.result.format)
    assert len(content) == disk_after(built.case)
    assert content[: len(before.view)] == before.view
    if built.case.pulls:
        return
    # Base does not shrink: where its disk goes on behind top's end it is what it was.
    assert content[len(before.view) :] == before.old_base[len(before.view) :]


def assert_children(built: BuiltCase, before: Before) -> None:
    assert [qemu.content(path) for path in built.above] == before.above
    assert [_bitmaps(path) for path in built.above] == before.bitmaps_above
    for path, leaks in zip(built.above, before.leaks_above, strict=True):
        report = qemu.check(path)
        assert (report["corruptions"], report["leaks"]) == (0, leaks)


def assert_files(built: BuiltCase, before: Before, result: Path) -> None:
    options = built.case.options
    assert [path.read_bytes() for path in built.below] == before.below
    if built.case.result.geometry is not None:
        qemu.assert_clean(result)
    if not spent_tombstones(built.case):
        end = max(before.plan.space.size, before.plan.space.required)
        # Direct I/O ends where a block of the file system does.
        assert result.stat().st_size <= end + -end % BLOCK
    middle = set(built.paths[built.case.base + 1 : built.case.top])
    left = {*built.below, *built.above, result}
    if built.case.pulls:
        merged = built.paths[built.case.base : built.case.top]
        staying = () if options.delete else merged
        left |= set(staying)
        contents = dict(zip(merged, before.merged, strict=True))
        assert all(path.read_bytes() == contents[path] for path in staying)
        below = built.below[-1].name if built.below else None
        assert qemu.info(result).get("backing-filename") == below
    elif not options.delete:
        left |= middle
    if not (options.delete or options.keep_name or built.case.pulls):
        left.add(built.top)
        assert qemu.content(built.top) == before.view
        if not middle and str(built.top) not in before.rewritten:
            assert built.top.read_bytes() == before.top_file
    found = {path for path in built.directory.iterdir() if path.suffix in {".raw", ".qcow2"}}
    assert found == left
    assert not list(built.directory.glob(".*.chainmerge-saved"))


def assert_snapshots(built: BuiltCase, before: Before, result: Path) -> None:
    """Each that is there shows what it showed; those of other images are all there."""
    for path, shown in before.snapshots.items():
        now = path
        if result == built.top and not built.case.pulls:
            now = result if path == built.base else path
            if path == built.top:
                continue
        if not now.exists():
            continue
        if qemu.info(now).get("snapshots"):
            # QEMU shows it with the size of the disk that the image has now.
            with _reachable_as(built.base, result):
                assert _snapshot(now)[: len(shown)] == shown
        else:
            assert str(path) in before.rewritten


@contextlib.contextmanager
def _reachable_as(base: Path, result: Path) -> Iterator[None]:
    """Give base its old name back, which images that are left between still have."""
    if base.exists():
        yield
        return
    base.symlink_to(result.name)
    try:
        yield
    finally:
        base.unlink()


def _holders(built: BuiltCase) -> list[Path]:
    paths = [*built.paths, *([] if built.branch is None else [built.branch])]
    layers = [*built.case.layers, *([] if built.case.branch is None else [built.case.branch])]
    return [path for path, layer in zip(paths, layers, strict=True) if layer.snapshot]


def _snapshot(path: Path) -> bytes:
    """What the one snapshot of an image shows."""
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "raw"
        qemu.qemu_img("convert", "-U", "-l", "before", "-O", "raw", path, raw)
        return raw.read_bytes()


def assert_bitmaps(built: BuiltCase, result: Path) -> None:
    expected = expected_bitmaps(built.case)
    note(f"expected bitmaps: {expected}")
    if built.case.result.geometry is None:
        return
    found = _bitmaps(result)
    listed = qemu.bitmap_names(result)
    assert found.keys() == listed.keys()
    left = found.keys() - expected.keys()
    # On a device of the exact size there may be no room to get rid of them.
    assert left <= (spent_tombstones(built.case) if built.case.on_device else set())
    assert all(listed[name]["flags"] == [] for name in left)
    assert found.keys() - left == expected.keys()
    for name, wanted in expected.items():
        assert listed[name]["flags"] == (["auto"] if wanted.enabled else []), name
        if wanted.granularity is not None:
            assert listed[name]["granularity"] == wanted.granularity, name
        assert found[name].dirty == np.packbits(wanted.dirty).tobytes(), name
    kept = sorted(name for name, wanted in expected.items() if wanted.enabled)
    # qemu-nbd takes the warning that QEMU has about untrusted ones for a failure.
    if kept and not any(layer.untrusted for layer in built.case.layers[: built.case.base]):
        # One for all: asking QEMU takes a process each time.
        assert_bits_by_qemu(result, kept[0], expected[kept[0]])


def assert_bits_by_qemu(image: Path, name: str, expected: ExpectedBitmap) -> None:
    runs = [(run.start, run.length) for run in qemu.dirty_ranges(image, name)]
    assert np.array_equal(_sectors(runs, len(expected.dirty)), expected.dirty), name


def _sectors(runs: list[tuple[int, int]], count: int) -> Sectors:
    dirty = np.zeros(count, dtype=bool)
    for start, length in runs:
        dirty[start // SECTOR : (start + length) // SECTOR] = True
    return dirty


def _content_of_base(built: BuiltCase, path: Path) -> bytes:
    return qemu.content(path, built.case.layers[built.case.base].format)


def _bitmaps(path: Path) -> dict[str, Bitmap]:
    image = open_qcow2(path)
    found = {}
    for entry in read_directory(image):
        runs: list[tuple[int, int]] = []
        if image.header.bitmaps_trusted and not entry.in_use:
            starts, lengths = read_bits(image, entry).ranges()
            runs = list(zip(starts.tolist(), lengths.tolist(), strict=True))
        dirty = _sectors(runs, image.header.virtual_size // SECTOR)
        found[entry.name] = Bitmap(
            int(entry.flags), entry.granularity, np.packbits(dirty).tobytes()
        )
    return found


# What the random chains have brought to light


@pytest.mark.parametrize(
    ("base_size", "top_size"),
    [(28672, 86528), (1000, 8192), (1000, 1024), (512, 512), (8192, 12800), (12800, 8192)],
)
def test_raw_bases_that_do_not_end_where_a_block_does(
    tmp_path: Path, base_size: int, top_size: int
) -> None:
    """With direct I/O QEMU refuses to write to them, or leaves them longer than they should be."""
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    base.write_bytes(b"x" * base_size)
    qemu.create(top, top_size, backing=base.name, backing_format="raw")
    qemu.qemu_io(top, f"write -P 7 {top_size - 512} 512", "write -P 8 0 512")
    expected = qemu.content(top)
    chainmerge.merge(top)
    content = qemu.content(base, "raw")
    assert content.startswith(expected)
    assert len(content) == max(top_size, -(-base_size // SECTOR) * SECTOR)


def test_a_finished_merge_into_a_raw_base_says_so(tmp_path: Path) -> None:
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    base.write_bytes(bytes(MIB))
    qemu.create(top, backing=base.name, backing_format="raw")
    qemu.qemu_io(top, "write -P 7 0 64k")
    options = MergeOptions(delete=True)
    assert chainmerge.merge(top, options=options).outcome is MergeOutcome.MERGED
    assert chainmerge.merge(top, options=options).outcome is MergeOutcome.ALREADY_MERGED


@pytest.mark.parametrize("where", ["below base", "top"])
def test_bitmaps_that_nobody_trusts_do_not_fail_a_merge(tmp_path: Path, where: str) -> None:
    """QEMU warns of them in a sentence that does not look like a warning."""
    root = qemu.create(tmp_path / "root.qcow2", MIB)
    base = qemu.create(tmp_path / "base.qcow2", backing=root.name)
    top = qemu.create(tmp_path / "top.qcow2", backing=base.name)
    odd = root if where == "below base" else top
    qemu.qemu_img("bitmap", "--add", odd, "monday")
    clear_autoclear_features(odd)
    qemu.qemu_io(top, "write -P 7 0 64k")
    expected = qemu.content(top)
    chainmerge.merge(top)
    assert qemu.content(base) == expected


def test_a_plan_says_why_base_cannot_grow(tmp_path: Path) -> None:
    base = qemu.create(tmp_path / "base.qcow2", MIB, compat="0.10")
    qemu.qemu_img("snapshot", "-c", "before", base)
    top = qemu.create(tmp_path / "top.qcow2", 2 * MIB, backing=base.name)
    plan_made = chainmerge.plan(top)
    assert [refusal.code for refusal in plan_made.refusals] == ["cannot-grow-base"]


def test_a_base_that_ends_in_a_compressed_cluster_of_parts(tmp_path: Path) -> None:
    """QEMU fails to make it larger where that would show what its backing file has."""
    root = qemu.create(tmp_path / "root.qcow2", MIB)
    end = 65536 + 14336
    base = qemu.create(
        tmp_path / "base.qcow2", end, backing=root.name, cluster_size=65536, extended_l2="on"
    )
    apply_writes(base, [WriteCompressed(65536, end - 65536)])
    top = qemu.create(tmp_path / "top.qcow2", MIB, backing=base.name)
    qemu.qemu_io(top, "write -P 7 0 4k")
    before = state(tmp_path)
    with pytest.raises(CannotGrowBase, match="its last cluster is compressed"):
        chainmerge.merge(top, options=MergeOptions(engine="qemu"))
    assert state(tmp_path) == before
    expected = qemu.content(top)
    chainmerge.merge(top)
    assert qemu.content(base) == expected
