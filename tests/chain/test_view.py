# SPDX-License-Identifier: Apache-2.0
"""The guest's view of chains, with QEMU as the judge, and the comparison of two views."""

from __future__ import annotations

import os
import tempfile
import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chainmerge.chain import comparing, layers, view
from chainmerge.chain.comparing import first_difference
from chainmerge.chain.layers import Layer, layer_of_qcow2, layer_of_raw
from chainmerge.chain.view import NO_LAYER, GuestView, Resolved
from chainmerge.errors import Interrupted
from chainmerge.qcow2.errors import EncryptedContent
from chainmerge.qcow2.mapping import Kind
from chainmerge.qcow2.readable import BytesReadable, Readable
from tests.support import qemu
from tests.support.images import (
    GIB,
    KIB,
    MIB,
    SECTOR,
    TIB,
    Discard,
    Geometry,
    ImagePlan,
    OpenImage,
    Write,
    WriteCompressed,
    WriteZeroes,
    apply_writes,
    build_chain,
    chain_plans,
    open_qcow2,
    ranges,
    view_of,
)
from tests.support.long_chain import build_long_chain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.qcow2.extents import Extents


def raw_view(content: bytes, name: str = "raw") -> GuestView:
    return GuestView((layer_of_raw(BytesReadable(name, content)),))


def runs_of(chain: GuestView) -> list[tuple[int, int, int]]:
    """Guest offset, layer and kind of all runs, joined where windows had split them."""
    joined: list[tuple[int, int, int]] = []
    for runs in chain.resolve():
        for guest, layer, kind in zip(
            runs.guest.tolist(), runs.layer.tolist(), runs.kind.tolist(), strict=True
        ):
            if not joined or joined[-1][1:] != (layer, kind):
                joined.append((guest, layer, kind))
    return joined


def bytes_read(chain: GuestView) -> int:
    return sum(
        layer.source.bytes_read for layer in chain.layers if isinstance(layer.source, OpenImage)
    )


def assert_well_formed(windows: list[Resolved], start: int, end: int, layers: int) -> None:
    at = start
    for runs in windows:
        assert runs.start == at
        at = runs.end
        assert (runs.length > 0).all()
        assert ((runs.guest + runs.length)[:-1] == runs.guest[1:]).all()
        assert (runs.layer < layers).all()
        has_data = np.isin(runs.kind, [Kind.DATA, Kind.COMPRESSED])
        assert (has_data == (runs.layer != NO_LAYER)).all()
    assert at == end


@given(plans=chain_plans(), data=st.data())
def test_a_chain_reads_as_qemu_reads_it(plans: list[ImagePlan], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        paths = build_chain(Path(scratch), plans)
        expected = qemu.content(paths[-1])
        chain = view_of(paths)
        size = chain.virtual_size
        assert chain.read(0, size) == expected
        assert_well_formed(list(chain.resolve()), 0, size, len(paths))
        start, length = data.draw(ranges(size))
        assert chain.read(start, length) == expected[start : start + length]
        assert_well_formed(list(chain.resolve(start, start + length)), start, start + length, 5)


@settings(max_examples=15)
@given(plans=chain_plans(), small=st.data())
def test_small_portions_make_no_difference(plans: list[ImagePlan], small: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        chain = view_of(build_chain(Path(scratch), plans))
        expected = chain.read(0, chain.virtual_size)
        whole = runs_of(chain)
        patch.setattr(view, "RUNS_AT_ONCE", small.draw(st.sampled_from((1, 4, 40))))
        patch.setattr(view, "PIECE_ALIGNMENT", small.draw(st.sampled_from((512, 24 * KIB, MIB))))
        patch.setattr(view, "DEFAULT_WINDOW", small.draw(st.sampled_from((16, 512, 4 * KIB))))
        assert chain.read(0, chain.virtual_size) == expected
        assert runs_of(chain) == whole
        assert_well_formed(list(chain.resolve()), 0, chain.virtual_size, len(plans))


def test_a_shorter_layer_hides_what_is_below_its_end(tmp_path: Path) -> None:
    """In the middle of a chain; the layers above and below are longer."""
    plans = [
        ImagePlan(Geometry(), 4 * MIB, [Write(0, 4 * MIB, seed=1)]),
        ImagePlan(Geometry(), MIB + 512, [Write(0, 64 * KIB, seed=2)]),
        ImagePlan(Geometry(4 * KIB), 3 * MIB, [Write(2 * MIB, 4 * KIB, seed=3)]),
    ]
    paths = build_chain(tmp_path, plans)
    chain = view_of(paths)
    assert runs_of(chain) == [
        (0, 1, Kind.DATA),
        (64 * KIB, 0, Kind.DATA),
        (MIB + 512, NO_LAYER, Kind.ZERO),
        (2 * MIB, 2, Kind.DATA),
        (2 * MIB + 4 * KIB, NO_LAYER, Kind.ZERO),
    ]
    assert chain.read(0, 3 * MIB) == qemu.content(paths[-1])


def test_what_no_layer_says_anything_about_stays_unallocated(tmp_path: Path) -> None:
    """A view of the upper part of a chain tells what it leaves to the images below."""
    plans = [
        ImagePlan(Geometry(), MIB, [Write(0, MIB)]),
        ImagePlan(Geometry(), MIB, [Write(64 * KIB, 64 * KIB)]),
        ImagePlan(Geometry(), MIB, [WriteZeroes(128 * KIB, 64 * KIB), Discard(0, 64 * KIB)]),
    ]
    assert runs_of(view_of(build_chain(tmp_path, plans)[1:])) == [
        (0, NO_LAYER, Kind.ZERO),
        (64 * KIB, 0, Kind.DATA),
        (128 * KIB, NO_LAYER, Kind.ZERO),
        (192 * KIB, NO_LAYER, Kind.UNALLOCATED),
    ]


def test_past_the_end_everything_is_zeros(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "image.qcow2", 64 * KIB)
    qemu.qemu_io(path, "write -q 0 64k")
    chain = view_of([path])
    assert chain.read(60 * KIB, 8 * KIB) == b"\xcd" * 4 * KIB + bytes(4 * KIB)
    assert chain.read(1 << 50, 16) == bytes(16)
    assert chain.read(0, 0) == b""


def test_raw_images_are_data_and_holes(tmp_path: Path) -> None:
    path = tmp_path / "image.raw"
    with path.open("wb") as file:
        file.truncate(4 * MIB + 100)
        file.seek(MIB)
        file.write(b"x" * MIB)
    chain = view_of([path])
    (runs,) = chain.resolve()
    assert runs.guest.tolist() == [0, MIB, 2 * MIB]
    assert runs.kind.tolist() == [Kind.ZERO, Kind.DATA, Kind.ZERO]
    assert chain.virtual_size == 4 * MIB + 512
    assert chain.read(0, chain.virtual_size) == qemu.content(path, "raw")


def test_raw_images_of_many_extents_are_resolved_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image.raw"
    with path.open("wb") as file:
        file.truncate(4 * MIB)
        for at in range(0, 4 * MIB, 128 * KIB):
            file.seek(at)
            file.write(b"x" * 64 * KIB)
    (whole,) = view_of([path]).resolve()
    monkeypatch.setattr(layers, "RAW_EXTENTS_AT_ONCE", 5)
    parts = list(view_of([path]).resolve())
    assert len(parts) == 7
    for name in ("guest", "length", "kind", "host", "layer"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        assert joined.tolist() == getattr(whole, name).tolist()


def test_a_compressed_cluster_is_unpacked_once_for_many_runs(tmp_path: Path) -> None:
    """Small clusters above leave a comb of a large compressed one."""
    comb = [Write(at, 512) for at in range(0, 256 * KIB, 1024)]
    plans = [
        ImagePlan(Geometry(2 * MIB), 2 * MIB, [WriteCompressed(0, 2 * MIB)]),
        ImagePlan(Geometry(512), 2 * MIB, comb),
    ]
    paths = build_chain(tmp_path, plans)
    chain = view_of(paths)
    base = chain.layers[0].source
    assert isinstance(base, OpenImage)
    (compressed,) = view_of(paths[:1]).resolve()
    before = base.bytes_read
    assert chain.read(0, 2 * MIB) == qemu.content(paths[-1])
    tables = 2 * MIB
    assert base.bytes_read - before < tables + 2 * int(compressed.csize[0])


def test_encrypted_content_is_not_read(tmp_path: Path) -> None:
    secret = ("--object", "secret,id=key,data=secret")
    path = tmp_path / "image.qcow2"
    # The old scheme: LUKS takes seconds to create, and the layer tells no difference.
    options = "encrypt.format=aes,encrypt.key-secret=key"
    qemu.qemu_img("create", "-q", "-f", "qcow2", *secret, "-o", options, path, str(MIB))
    node = f"driver=qcow2,{options},file.filename={path}"
    qemu.run("qemu-io", *secret, "--image-opts", "-c", "write -q 0 64k", node)
    chain = view_of([path])
    assert chain.read(64 * KIB, SECTOR) == bytes(SECTOR)
    with pytest.raises(EncryptedContent, match="is encrypted"):
        chain.read(0, SECTOR)
    with pytest.raises(EncryptedContent, match="is encrypted"):
        first_difference(chain, raw_view(bytes(MIB)))


def content_difference(a: bytes, b: bytes) -> int | None:
    """As slow and simple as it gets."""
    longest = max(len(a), len(b))
    left, right = (np.frombuffer(side.ljust(longest, b"\0"), np.uint8) for side in (a, b))
    unequal = np.flatnonzero(left != right)
    return int(unequal[0]) if len(unequal) else None


@given(plans=chain_plans(), data=st.data())
def test_the_first_difference_is_found(plans: list[ImagePlan], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            comparing, "COMPARE_BLOCK", data.draw(st.sampled_from((4 * KIB, 100 * KIB, 4 * MIB)))
        )
        paths = build_chain(Path(scratch), plans)
        contents = [qemu.content(path, path.suffix[1:]) for path in paths]
        one = data.draw(st.integers(0, len(paths) - 1))
        a, b = view_of(paths), view_of(paths[: one + 1])
        expected = content_difference(contents[-1], contents[one])
        assert first_difference(a, b) == expected
        assert first_difference(b, a) == expected

        changed = bytearray(contents[-1])
        place = data.draw(st.integers(0, len(changed) - 1))
        changed[place] ^= 0x80
        assert first_difference(a, raw_view(bytes(changed))) == place
        assert first_difference(a, raw_view(bytes(changed)), place + 1) is None
        assert first_difference(a, raw_view(bytes(changed)), 0, place) is None


def test_a_longer_view_may_end_in_zeros_only(tmp_path: Path) -> None:
    content = b"x" * MIB
    assert first_difference(raw_view(content), raw_view(content + bytes(MIB))) is None
    longer = raw_view(content + bytes(MIB - 1) + b"x")
    assert first_difference(raw_view(content), longer) == 2 * MIB - 1
    assert first_difference(longer, raw_view(content)) == 2 * MIB - 1


def test_what_is_at_the_same_place_of_the_same_file_is_not_read(tmp_path: Path) -> None:
    plans = [
        ImagePlan(Geometry(), 4 * MIB, [WriteCompressed(0, MIB), Write(MIB, 3 * MIB)]),
        ImagePlan(Geometry(), 4 * MIB, [Write(2 * MIB, 64 * KIB, seed=2)]),
    ]
    paths = build_chain(tmp_path, plans)
    (tmp_path / "other-name.qcow2").hardlink_to(paths[0])
    a, b = view_of(paths), view_of([tmp_path / "other-name.qcow2"])
    assert first_difference(a, b) == 2 * MIB
    metadata = 4 * 64 * KIB
    assert bytes_read(a) < 64 * KIB + metadata
    assert bytes_read(b) < 64 * KIB + metadata


def test_other_places_of_the_same_file_are_compared(tmp_path: Path) -> None:
    """The file as a disk, and the disk in the file."""
    (path,) = build_chain(tmp_path, [ImagePlan(Geometry(), MIB, [Write(0, MIB)])])
    file = GuestView((layer_of_raw(OpenImage(path)),))
    expected = content_difference(path.read_bytes(), qemu.content(path))
    assert first_difference(view_of([path]), file) == expected == 0


def test_holes_of_preallocated_images_are_not_read(tmp_path: Path) -> None:
    """Terabytes of them would take hours."""
    full = qemu.create(tmp_path / "full.qcow2", TIB // 8, preallocation="metadata")
    empty = qemu.create(tmp_path / "empty.qcow2", TIB // 8)
    qemu.qemu_io(full, f"write -q {TIB // 8 - 64 * KIB} 512")
    a, b = view_of([full]), view_of([empty])
    assert first_difference(a, b) == TIB // 8 - 64 * KIB
    assert bytes_read(a) < 32 * MIB


def test_comparing_takes_little_memory_and_tells_how_far_it_is(tmp_path: Path) -> None:
    plans = [ImagePlan(Geometry(), 128 * MIB, [Write(0, 128 * MIB)])]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    a, b = (view_of(build_chain(tmp_path / name, plans)) for name in ("a", "b"))
    reached: list[int] = []
    tracemalloc.start()
    assert first_difference(a, b, progress=reached.append) is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 * MIB
    assert reached == sorted(reached)
    assert reached[-1] == 128 * MIB
    assert len(reached) >= 128 // 4


def test_a_comparison_can_be_stopped() -> None:
    with pytest.raises(Interrupted):
        first_difference(raw_view(b"a" * MIB), raw_view(b"b" * MIB), should_stop=lambda: True)


def test_a_chain_of_hundreds_of_layers_needs_little_memory(tmp_path: Path) -> None:
    """Every layer with a table of 8192 separate extents, which are 240 KiB of arrays each."""
    path = qemu.create(tmp_path / "image.qcow2", 256 * MIB, cluster_size=4 * KIB)
    every_other = [Write(at, 512) for at in range(0, 16 * MIB, 8 * KIB)]
    apply_writes(path, every_other)
    image = open_qcow2(path)
    chain = GuestView((layer_of_qcow2(image, image.readable),) * 300)
    tracemalloc.start()
    found = sum(int((runs.layer != NO_LAYER).sum()) for runs in chain.resolve())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == len(every_other)
    assert peak < 100 * MIB


@dataclass(frozen=True)
class CountedLayer:
    """A layer that notes how much it was asked and how many extents it had to say."""

    inner: Layer
    asked: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def virtual_size(self) -> int:
        return self.inner.virtual_size

    @property
    def cluster_size(self) -> int:
        return self.inner.cluster_size

    @property
    def source(self) -> Readable:
        return self.inner.source

    def iter_extents(self, start: int, end: int, window: int) -> Iterator[Extents]:
        self.asked.append(0)
        for extents in self.inner.iter_extents(start, end, window):
            self.asked[-1] += len(extents)
            yield extents

    def read_data(self, host: int, length: int) -> bytes:
        return self.inner.read_data(host, length)

    def read_compressed(self, host: int, csize: int) -> bytes:
        return self.inner.read_compressed(host, csize)


def test_more_layers_take_more_steps_in_proportion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted: what layers are asked and say, and how many runs go into deciding among them."""
    weighed: list[int] = []
    uppermost = view._uppermost

    def counted(said: Sequence[Resolved], at: int, upto: int) -> Resolved:
        weighed.append(sum(map(len, said)))
        return uppermost(said, at, upto)

    monkeypatch.setattr(view, "_uppermost", counted)
    steps = {}
    chain = view_of(list(build_long_chain(tmp_path, 240, 30).paths))
    for count in (60, 240):
        weighed.clear()
        layers = [CountedLayer(layer) for layer in chain.layers[:count]]
        assert sum(map(len, GuestView(tuple(layers)).resolve())) > count
        assert all(len(layer.asked) == 1 for layer in layers)
        steps[count] = sum(layer.asked[0] for layer in layers) + sum(weighed)
    assert steps[240] <= 4.2 * steps[60]


def test_a_dense_layer_below_many_sparse_ones_is_resolved_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upper ones are asked again for each piece, but no more often than that."""
    monkeypatch.setattr(view, "RUNS_AT_ONCE", 2000)
    root = qemu.create(tmp_path / "root.qcow2", GIB, cluster_size=4 * KIB)
    apply_writes(root, [Write(at, 512) for at in range(0, 32 * MIB, 8 * KIB)])
    sparse = qemu.create(tmp_path / "sparse.qcow2", GIB)
    apply_writes(sparse, [Write(at, 512) for at in range(0, GIB, 128 * MIB)])
    upper = view_of([sparse]).layers * 20
    layers = tuple(CountedLayer(layer) for layer in (*view_of([root]).layers, *upper))
    chain = GuestView(layers)
    pieces = list(chain.resolve())
    assert max(map(len, pieces)) <= 2000
    assert len(layers[-1].asked) <= 2 * 2 * len(pieces)


@given(ranges=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 70)), max_size=30))
def test_the_last_range_that_covers_a_slot_is_found(ranges: list[tuple[int, int]]) -> None:
    slots = 80
    claims = [(0, slots), *((low, min(low + length, slots)) for low, length in ranges)]
    first, behind = (np.array(edge, np.intp) for edge in zip(*claims, strict=True))
    found = view._last_covering(first, behind, slots)
    expected = [
        max(index for index, (low, high) in enumerate(claims) if low <= slot < high)
        for slot in range(slots)
    ]
    assert found.tolist() == expected


def test_a_block_device_is_one_extent(tmp_path: Path) -> None:
    content = os.urandom(MIB) + bytes(MIB)
    (tmp_path / "disk").write_bytes(content)
    device = qemu.run("losetup", "--find", "--show", tmp_path / "disk").stdout.strip()
    try:
        chain = GuestView((layer_of_raw(OpenImage(Path(device))),))
        (runs,) = chain.resolve()
        assert runs.length.tolist() == [2 * MIB]
        assert chain.read(0, 2 * MIB) == content
    finally:
        qemu.run("losetup", "--detach", device)
