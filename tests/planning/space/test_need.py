# SPDX-License-Identifier: Apache-2.0
"""The bound on the space that a merge takes, held against merges into exactly that much."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from chainmerge.chain.layers import layer_of_qcow2
from chainmerge.chain.view import GuestView
from chainmerge.engines.metadata.bitmap_set import StoredBitmap
from chainmerge.engines.metadata.replacement import replace_bitmaps
from chainmerge.engines.qemu.commit import commit
from chainmerge.engines.qemu.nodes import ImageSpec
from chainmerge.planning.space.arrivals import (
    BaseFacts,
    count_arrivals,
    qemu_growth_obstacle,
)
from chainmerge.planning.space.clusters import HostLayout, layout_of
from chainmerge.planning.space.errors import CannotGrowBase
from chainmerge.planning.space.need import (
    BitmapShape,
    MergeDemand,
    SpaceNeed,
    raw_space_need,
    space_need,
)
from chainmerge.qcow2.bitmaps import BitmapFlag, read_directory
from chainmerge.qcow2.bits import BitSet
from chainmerge.qcow2.check import check
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.refcounts import read_refcount_table, read_refcounts, refcounts_per_block
from chainmerge.qcow2.runs import NO_RUNS, Runs, joined_runs
from chainmerge.storage.files import FileReadable, WritablePort
from tests.planning.space.sizes import MIB, header_of
from tests.support.qemu import assert_clean, content, create, info, qemu_img, qemu_io, run
from tests.support.qemu import check as check_by_qemu

if TYPE_CHECKING:
    from collections.abc import Sequence


KIB = 1 << 10


def layout_from(image: Qcow2Image) -> HostLayout:
    per_block = refcounts_per_block(image.header)
    blocks = read_refcount_table(image) != 0
    # In small windows, so that runs cross from one to the next.
    starts = range(0, -(-image.readable.size // image.header.cluster_size), 1000)
    windows = (read_refcounts(image, first, 1000) for first in starts)
    return layout_of(windows, blocks, image.header.cluster_size, per_block)


def bitmap_runs(image: Qcow2Image) -> Runs:
    """The clusters of all bitmaps, as `qemu-img check` would count them."""
    from chainmerge.engines.metadata.old_tree import bitmap_clusters

    clusters = bitmap_clusters(image)
    return joined_runs([Runs(clusters, np.ones(len(clusters), np.int64))])


@dataclass(frozen=True)
class Chain:
    """Base, what lies below it, and the images that go down into it."""

    base: Path
    below: Path | None
    merged: tuple[Path, ...]

    @property
    def all(self) -> list[Path]:
        return [*([self.below] if self.below else []), self.base, *self.merged]


@dataclass(frozen=True)
class Bitmap:
    name: str
    granularity: int
    dirty: tuple[tuple[int, int], ...] = ()

    def stored(self, disk_size: int) -> StoredBitmap:
        ranges = [
            (at % disk_size, min(size, disk_size - at % disk_size)) for at, size in self.dirty
        ]
        bits = BitSet.from_ranges(ranges, disk_size, self.granularity)
        return StoredBitmap(self.name, bits, BitmapFlag.AUTO if self.dirty else BitmapFlag(0))

    def shape(self, header_cluster_size: int, disk_size: int) -> BitmapShape:
        bits = self.stored(disk_size).bits.to_packed()
        padded = np.zeros(-(-len(bits) // header_cluster_size) * header_cluster_size, np.uint8)
        padded[: len(bits)] = bits
        parts = padded.reshape(-1, header_cluster_size).any(axis=1)
        return BitmapShape(len(self.name.encode()), self.granularity, int(parts.sum()))


def demand_of(
    chain: Chain, stand_ins: Sequence[Bitmap], final: Sequence[Bitmap], *, prunes: bool = True
) -> MergeDemand:
    with ExitStack() as stack:
        images = [Qcow2Image(stack.enter_context(FileReadable(path))) for path in chain.all]
        base = images[-len(chain.merged) - 1]
        merged = images[-len(chain.merged) :]
        layout = layout_from(base)
        size = max(base.header.virtual_size, merged[-1].header.virtual_size)
        view = GuestView(tuple(layer_of_qcow2(image, image.readable) for image in merged))
        facts = BaseFacts(
            str(chain.base),
            base.header,
            images[0].header.virtual_size if chain.below else None,
            layout.shared,
        )
        arrivals = count_arrivals(
            facts,
            base.l1,
            view.resolve(),
            GuestView((layer_of_qcow2(base, base.readable),)).resolve(),
            merged[-1].header.virtual_size,
        )
        cluster_size = base.header.cluster_size
        return MergeDemand(
            header=base.header,
            layout=layout,
            old_bitmaps=bitmap_runs(base) if prunes else NO_RUNS,
            prunes=prunes,
            stand_ins=[bitmap.shape(cluster_size, size) for bitmap in stand_ins],
            final_bitmaps=[bitmap.shape(cluster_size, size) for bitmap in final],
            arrivals=arrivals,
            virtual_size_after=size,
        )


@dataclass(frozen=True)
class Outcome:
    """A merge into exactly what was said to be needed, and what it used of it, in bytes."""

    need: SpaceNeed
    cluster_size: int
    copied_end: int
    stored_end: int

    @property
    def excess(self) -> int:
        """Clusters that nobody took."""
        used = max(self.need.prune, self.copied_end, self.stored_end, self.need.image_end)
        return (self.need.required - used) // self.cluster_size


def file_end(path: Path) -> int:
    with FileReadable(path) as readable:
        return check(Qcow2Image(readable)).image_end_offset


def replace_with(path: Path, bitmaps: Sequence[Bitmap]) -> int:
    with WritablePort(path) as port:
        size = Qcow2Image(port).header.virtual_size
        return replace_bitmaps(port, [bitmap.stored(size) for bitmap in bitmaps]).required_size


def merge_into_what_is_needed(
    chain: Chain, stand_ins: Sequence[Bitmap], final: Sequence[Bitmap], *, prunes: bool = True
) -> Outcome:
    before = content(chain.merged[-1])
    beyond = content(chain.base)[len(before) :]
    demand = demand_of(chain, stand_ins, final, prunes=prunes)
    need = space_need(demand)
    assert sum(need.breakdown.values()) == need.required
    for _ in range((2 if stand_ins else 1) if prunes else 0):
        assert replace_with(chain.base, stand_ins) <= need.prune
    os.truncate(chain.base, need.required)
    images = [ImageSpec(str(path), "qcow2") for path in chain.all]
    base_index = len(images) - len(chain.merged) - 1
    images[base_index] = ImageSpec(str(chain.base), "qcow2", limit=need.required)
    commit(images, base_index, (), lambda _: None, lambda: False)
    copied_end = file_end(chain.base)
    stored_end = replace_with(chain.base, final)
    assert stored_end <= need.required
    assert_clean(chain.base)
    assert content(chain.base) == before + beyond
    with FileReadable(chain.base) as readable:
        names = {entry.name for entry in read_directory(Qcow2Image(readable))}
    assert names == {bitmap.name for bitmap in final}
    return Outcome(need, demand.header.cluster_size, copied_end, stored_end)


@dataclass(frozen=True)
class Geometry:
    cluster_size: int
    largest_disk: int
    extended: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {"cluster_size": self.cluster_size, "extended_l2": "on" if self.extended else "off"}


GEOMETRIES = [
    Geometry(512, 3 * MIB),
    Geometry(4 * KIB, 8 * MIB),
    Geometry(16 * KIB, 12 * MIB, extended=True),
    Geometry(64 * KIB, 24 * MIB),
    Geometry(128 * KIB, 32 * MIB),
    Geometry(128 * KIB, 32 * MIB, extended=True),
    Geometry(2 * MIB, 48 * MIB),
]


@dataclass(frozen=True)
class Write:
    """A guest request: its place and size are parts of the disk, in 1/1000."""

    kind: str
    place: int
    size: int

    def command(self, geometry: Geometry, disk: int) -> str:
        unit = geometry.cluster_size if self.kind == "write -c" else 512
        start = disk * self.place // 1000 // unit * unit
        size = max(unit, disk * self.size // 1000 // unit * unit)
        size = min(size, (disk - start) // unit * unit)
        pattern = f" -P {1 + (self.place + self.size) % 250}" if "-z" not in self.kind else ""
        pattern = "" if self.kind == "discard" else pattern
        return f"{self.kind}{pattern} {start} {size}" if size else "read 0 512"


WRITES = st.lists(
    st.builds(
        Write,
        st.sampled_from(
            ["write", "write", "write", "write -c", "write -z", "write -zu", "discard"]
        ),
        st.integers(0, 999),
        st.one_of(st.integers(0, 20), st.integers(0, 400)),
    ),
    min_size=2,
    max_size=12,
)
BITMAPS = st.lists(
    st.builds(
        Bitmap,
        st.sampled_from(["a", "b" * 100, "c" * 1000, "d"]),
        st.sampled_from([512, 4096, 65536]),
        st.lists(
            st.tuples(st.integers(0, 1 << 25), st.integers(1, 1 << 20)), min_size=1, max_size=3
        ).map(tuple),
    ),
    max_size=3,
    unique_by=lambda bitmap: bitmap.name,
)


@st.composite
def chains(draw: st.DrawFn, directory: Path) -> tuple[Chain, list[Bitmap], list[Bitmap]]:
    geometry = draw(st.sampled_from(GEOMETRIES))
    hundredths = st.sampled_from([100, 99, 75, 50, 33, 10, 1])
    sizes = st.builds(
        lambda part, sectors: geometry.largest_disk * part // 100 // 4096 * 4096 + sectors * 512,
        hundredths,
        st.sampled_from([0, 0, 1, 7]),
    )
    disk = draw(sizes)
    compat = (
        draw(st.sampled_from(["1.1", "1.1", "1.1", "0.10"])) if not geometry.extended else "1.1"
    )
    options: dict[str, Any] = geometry.options | {"compat": compat}
    if compat == "1.1":
        options["refcount_bits"] = draw(st.sampled_from([1, 8, 16, 64]))
    below = None
    if draw(st.booleans()):
        below = create(directory / "below", draw(sizes) if compat == "1.1" else disk)
        guest_writes(below, commands(draw, Geometry(64 * KIB, 0), info(below)["virtual-size"]))
    base = create(directory / "base", disk, backing=below, **options)
    guest_writes(base, commands(draw, geometry, disk))
    snapshot = options.get("refcount_bits", 16) != 1 and draw(st.sampled_from([False, False, True]))
    if snapshot:
        qemu_img("snapshot", "-c", "internal", base, expect=(0, 1))
        guest_writes(base, commands(draw, geometry, disk))
    old: list[Bitmap] = draw(BITMAPS) if compat == "1.1" else []
    final: list[Bitmap] = draw(BITMAPS) if compat == "1.1" else []
    assume(is_clean(base))
    if old:
        replace_with(base, old)
        guest_writes(base, commands(draw, geometry, disk))
    merged: list[Path] = []
    for number in range(draw(st.integers(1, 2))):
        shape = draw(st.sampled_from(GEOMETRIES))
        size = disk if compat == "0.10" and snapshot else draw(st.one_of(st.just(disk), sizes))
        size = min(size, geometry.largest_disk)
        path = create(
            directory / f"over{number}", size, backing=[base, *merged][-1], **shape.options
        )
        guest_writes(path, commands(draw, shape, size))
        merged.append(path)
    assume(all(is_clean(path) for path in [base, *merged, *([below] if below else [])]))
    stand_ins = [Bitmap(bitmap.name, bitmap.granularity) for bitmap in old]
    return Chain(base, below, tuple(merged)), stand_ins, final


def commands(draw: st.DrawFn, geometry: Geometry, disk: int) -> list[str]:
    return [write.command(geometry, disk) for write in draw(WRITES)]


def guest_writes(image: Path, requests: Sequence[str]) -> None:
    """Run them all; a compressed write fails where there is a cluster already."""
    if requests:
        arguments = [argument for request in requests for argument in ("-c", request)]
        run("qemu-io", "-f", "qcow2", *arguments, image, expect=(0, 1))


def is_clean(image: Path) -> bool:
    """False if QEMU itself damaged the image: it can, by compressed writes between others."""
    report = check_by_qemu(image)
    marked = info(image)["format-specific"]["data"].get("corrupt", False)
    return not (report["corruptions"] or report["leaks"] or marked)


@given(st.data())
def test_the_bound_is_never_too_small(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        chain, stand_ins, final = data.draw(chains(Path(scratch)))
        outcome = merge_into_what_is_needed(chain, stand_ins, final)
        # Shown with `pytest -s`: by how much it is too large.
        print(f"{outcome.excess} clusters of {outcome.cluster_size} left over")


def chain_of(directory: Path, disk: int, base: list[str], top: list[str], **options: Any) -> Chain:
    """Base and top, made by guest requests."""
    below = create(directory / "base", disk, **options)
    qemu_io(below, *base)
    above = create(directory / "top", backing=below)
    qemu_io(above, *top)
    return Chain(below, None, (above,))


def test_room_for_a_longer_refcount_table(tmp_path: Path) -> None:
    options = {"cluster_size": 512, "refcount_bits": 64}
    writes = ["write -P 1 0 9M"]
    chain = chain_of(
        tmp_path, 10 * MIB, [f"write -P 2 {n}M 300k" for n in range(9)], writes, **options
    )
    table = header_of(chain.base).refcount_table_clusters
    merge_into_what_is_needed(chain, [], [])
    assert header_of(chain.base).refcount_table_clusters > table


def test_room_where_gaps_are_too_short_for_a_request(tmp_path: Path) -> None:
    # Every other cluster is freed: 100 gaps of a cluster, while requests take 16 of them.
    fill = ["write -P 1 0 200k", *(f"discard {n * 2}k 1k" for n in range(100))]
    chain = chain_of(tmp_path, 4 * MIB, fill, ["write -P 2 1M 1M"], cluster_size=1024)
    outcome = merge_into_what_is_needed(chain, [], [])
    assert outcome.copied_end >= outcome.need.image_end + MIB
    assert outcome.excess < 16


def test_room_behind_the_end_though_there_is_room_below(tmp_path: Path) -> None:
    # The cluster that is written in place is the last of the file, so QEMU goes on behind it.
    fill = ["write -P 1 0 2M", "write -P 2 4M 64k", "discard 0 2M"]
    chain = chain_of(tmp_path, 8 * MIB, fill, ["write -P 3 4M 256k"])
    outcome = merge_into_what_is_needed(chain, [], [])
    assert outcome.copied_end > outcome.need.image_end


def test_room_for_the_bitmaps_that_qemu_writes_anew(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, 4 * MIB, ["write -P 1 0 64k"], ["write -P 2 1M 2M"])
    stand_ins = [Bitmap(name, 65536) for name in ("one", "two", "three")]
    replace_with(chain.base, stand_ins)
    outcome = merge_into_what_is_needed(chain, stand_ins, [], prunes=False)
    assert outcome.excess == 0


DEMO_VOLUME = 128 * MIB


@pytest.mark.parametrize("stale", [0, 6, 32])
def test_a_volume_of_128_mib_takes_126_mib_of_data(tmp_path: Path, stale: int) -> None:
    base = create(tmp_path / "base", 1 << 30)
    for number in range(stale):
        qemu_img("bitmap", "--add", base, f"stale{number}")
    for name in ("both", "too"):
        qemu_img("bitmap", "--add", base, name)
    top = create(tmp_path / "top", backing=base)
    qemu_io(top, "write -P 1 0 100M", "write -P 2 900M 26M")
    stand_ins = [Bitmap("both", 65536), Bitmap("too", 65536)]
    dirty = ((0, 100 * MIB), (900 * MIB, 26 * MIB))
    final = [Bitmap(name, 65536, dirty) for name in ("both", "too", "new")]

    need = space_need(demand_of(Chain(base, None, (top,)), stand_ins, final))

    assert need.required <= DEMO_VOLUME
    assert need.prune <= DEMO_VOLUME


def test_the_demo_fits_its_volume(tmp_path: Path) -> None:
    base = create(tmp_path / "base", 1 << 30)
    for number in range(32):
        qemu_img("bitmap", "--add", base, f"stale{number}")
    top = create(tmp_path / "top", backing=base)
    qemu_io(top, "write -P 1 0 126M")
    outcome = merge_into_what_is_needed(
        Chain(base, None, (top,)),
        [Bitmap("good", 65536)],
        [Bitmap("good", 65536, ((0, 126 * MIB),))],
    )
    assert outcome.need.required <= DEMO_VOLUME
    assert outcome.excess < 16


def test_zeros_in_large_clusters_may_be_data_but_seldom_are(tmp_path: Path) -> None:
    zeros = ["write -z 0 16M", "write -P 1 16M 1M"]
    chain = chain_of(tmp_path, 32 * MIB, ["write -P 2 0 64k"], zeros, cluster_size="1M")
    need = space_need(demand_of(chain, [], []))
    assert need.breakdown["zeros as data"] == 15 * MIB
    assert need.optimal < 8 * MIB
    merge_into_what_is_needed(chain, [], [])


@pytest.mark.parametrize(
    ("options", "snapshot", "backing_size", "reason"),
    [
        ({"cluster_size": 512}, False, None, "L1 table"),
        ({"compat": "0.10"}, True, None, "internal snapshots"),
        ({"compat": "0.10"}, False, 8 * MIB, "backing file is longer"),
        ({"compat": "0.10"}, False, 4 * MIB, None),
        ({"compat": "1.1"}, True, 8 * MIB, None),
    ],
)
def test_what_qemu_cannot_make_larger(
    tmp_path: Path,
    options: dict[str, Any],
    snapshot: bool,
    backing_size: int | None,
    reason: str | None,
) -> None:
    base = create(tmp_path / "base", 4 * MIB, **options)
    if snapshot:
        qemu_img("snapshot", "-c", "one", base)
    facts = BaseFacts(str(base), header_of(base), backing_size, NO_RUNS)
    size = (1 << 40) if reason == "L1 table" else 16 * MIB
    assert qemu_growth_obstacle(facts, 4 * MIB) is None
    obstacle = qemu_growth_obstacle(facts, size)
    assert (obstacle is None) == (reason is None)
    if obstacle is not None and reason is not None:
        assert reason in obstacle.sentence
        with pytest.raises(CannotGrowBase):
            count_arrivals(facts, np.zeros(1, np.uint64), [], [], size)


def test_raw_base_is_as_large_as_the_disk() -> None:
    assert raw_space_need(1000, 4096 + 1).required == 4608
    assert raw_space_need(8192, 4096).required == 8192
