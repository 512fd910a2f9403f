# SPDX-License-Identifier: Apache-2.0
"""BitSet against the plainest model there is: a Python set of bit numbers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chainmerge.qcow2.bits import MAX_PACKED_SIZE, BitSet, is_storable, union_all

KIB = 1024
MIB = 1024 * KIB
TIB = 1024**4
CHUNK_BITS = 8 * 64 * KIB

# No process is started here: an example costs a millisecond.
many = settings(max_examples=8 * settings().max_examples)


@dataclass(frozen=True)
class Model:
    disk_size: int
    granularity: int
    bits: frozenset[int]

    @property
    def bit_count(self) -> int:
        return -(-self.disk_size // self.granularity)

    def packed(self) -> bytes:
        data = bytearray(-(-self.bit_count // 8))
        for bit in self.bits:
            data[bit // 8] |= 1 << bit % 8
        return bytes(data)

    def sectors(self) -> set[int]:
        """Dirty bytes of the disk, as numbers of its 512-byte sectors."""
        per_bit = self.granularity // 512
        last = -(-self.disk_size // 512)
        return {
            sector
            for bit in self.bits
            for sector in range(bit * per_bit, min((bit + 1) * per_bit, last))
        }

    def built(self) -> BitSet:
        return BitSet.from_packed(self.packed(), self.disk_size, self.granularity)


def model_of_sectors(sectors: set[int], disk_size: int, granularity: int) -> Model:
    per_bit = granularity // 512
    last = -(-disk_size // granularity)
    bits = {sector // per_bit for sector in sectors}
    return Model(disk_size, granularity, frozenset(bit for bit in bits if bit < last))


def bits_of(bitset: BitSet) -> frozenset[int]:
    unpacked = np.unpackbits(bitset.to_packed(), bitorder="little")
    return frozenset(np.flatnonzero(unpacked).tolist())


granularities = st.sampled_from([512, 1 * KIB, 4 * KIB, 64 * KIB])
# Sizes in sectors, so that the last granule is often a partial one; some pass a chunk of bits.
small_sizes = st.integers(0, 600).map(lambda sectors: sectors * 512)


@st.composite
def models(
    draw: st.DrawFn,
    sizes: st.SearchStrategy[int] = small_sizes,
    grains: st.SearchStrategy[int] = granularities,
) -> Model:
    disk_size, granularity = draw(sizes), draw(grains)
    count = -(-disk_size // granularity)
    if count == 0:
        return Model(disk_size, granularity, frozenset())
    runs = draw(st.lists(st.tuples(st.integers(0, count - 1), st.integers(1, 40)), max_size=12))
    bits = {bit for start, length in runs for bit in range(start, min(start + length, count))}
    return Model(disk_size, granularity, frozenset(bits))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Model, Model]:
    """Two models of the same geometry."""
    one = draw(models())
    other = draw(models(st.just(one.disk_size), st.just(one.granularity)))
    return one, other


# Few bits, but around the edges of chunks: the model stays small while the disk is large.
CHUNKY_GRANULARITY = 512
chunky_bits = st.sets(
    st.one_of(
        st.integers(0, 20),
        st.integers(CHUNK_BITS - 20, CHUNK_BITS + 20),
        st.integers(3 * CHUNK_BITS - 20, 3 * CHUNK_BITS + 9),
    ),
    max_size=40,
)


def chunky_model(bits: set[int]) -> Model:
    return Model((3 * CHUNK_BITS + 10) * CHUNKY_GRANULARITY, CHUNKY_GRANULARITY, frozenset(bits))


@many
@given(models())
def test_serialised_form_and_facts(model: Model) -> None:
    bitset = model.built()
    assert bitset.to_packed().tobytes() == model.packed()
    assert bits_of(bitset) == model.bits
    assert bitset.bits == model.bit_count
    assert bitset.packed_size == len(model.packed())
    assert bitset.count() == len(model.bits)
    assert bitset.is_empty == (not model.bits)
    assert bitset.dirty_bytes() == 512 * len(model.sectors())


@many
@given(models())
def test_tail_bits_are_dropped_when_read(model: Model) -> None:
    noisy = bytearray(model.packed())
    if model.bit_count % 8:
        noisy[-1] |= 0xFF << model.bit_count % 8 & 0xFF
    bitset = BitSet.from_packed(noisy, model.disk_size, model.granularity)
    assert bitset == model.built()
    assert bitset.count() == len(model.bits)


@many
@given(models())
def test_ranges_are_maximal_ascending_and_exact(model: Model) -> None:
    starts, lengths = model.built().ranges()
    assert starts.dtype == lengths.dtype == np.uint64
    ranges = list(zip(starts.tolist(), lengths.tolist(), strict=True))
    assert all(length > 0 for _, length in ranges)
    ends_before_next = itertools.pairwise(ranges)
    assert all(one[0] + one[1] < other[0] for one, other in ends_before_next)
    sectors = {at // 512 for start, length in ranges for at in range(start, start + length, 512)}
    assert sectors == model.sectors()


@many
@given(models())
def test_ranges_round_trip(model: Model) -> None:
    bitset = model.built()
    starts, lengths = bitset.ranges()
    pairs_ = list(zip(starts.tolist(), lengths.tolist(), strict=True))
    assert BitSet.from_ranges(pairs_, model.disk_size, model.granularity) == bitset
    again = BitSet.from_range_arrays(starts, lengths, model.disk_size, model.granularity)
    assert again == bitset


@many
@given(st.data(), small_sizes, granularities)
def test_from_ranges_dirties_what_ranges_touch(
    data: st.DataObject, disk_size: int, granularity: int
) -> None:
    spans = st.tuples(st.integers(0, disk_size), st.integers(0, disk_size)).map(sorted)
    drawn = data.draw(st.lists(spans, max_size=10))
    ranges = [(start, end - start) for start, end in drawn]
    touched = {
        bit
        for start, length in ranges
        if length
        for bit in range(start // granularity, (start + length - 1) // granularity + 1)
    }
    assert bits_of(BitSet.from_ranges(ranges, disk_size, granularity)) == touched


@pytest.mark.parametrize("bad", [(0, 4097), (4096, 1), (-1, 1), (0, -1), (1 << 63, 1 << 63)])
def test_ranges_off_the_disk_are_refused(bad: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="not on the disk"):
        BitSet.from_ranges([(0, 512), bad], 4096, 512)


def test_range_arrays_off_the_disk_are_refused() -> None:
    for start, length in [(4096, 1), (5000, 0), (8, 2**64 - 8)]:
        arrays = np.array([start], np.uint64), np.array([length], np.uint64)
        with pytest.raises(ValueError, match="not on the disk"):
            BitSet.from_range_arrays(*arrays, 4096, 512)


@many
@given(pairs())
def test_union_and_covers(pair: tuple[Model, Model]) -> None:
    one, other = pair[0].built(), pair[1].built()
    union = one.union(other)
    assert bits_of(union) == pair[0].bits | pair[1].bits
    assert union == other.union(one)
    assert union.covers(one)
    assert union.covers(other)
    assert one.covers(other) == (pair[0].bits >= pair[1].bits)
    assert (one == other) == (pair[0].bits == pair[1].bits)


@many
@given(pairs())
def test_making_sets_leaves_their_sources_alone(pair: tuple[Model, Model]) -> None:
    one, other = pair[0].built(), pair[1].built()
    one.union(other)
    one.with_disk_size(one.disk_size // 2)
    one.with_granularity(512)
    one.with_granularity(256 * KIB)
    assert bits_of(one) == pair[0].bits
    assert bits_of(other) == pair[1].bits


@many
@given(models(), small_sizes)
def test_with_disk_size(model: Model, disk_size: int) -> None:
    resized = model.built().with_disk_size(disk_size)
    expected = Model(disk_size, model.granularity, frozenset())
    kept = frozenset(bit for bit in model.bits if bit < expected.bit_count)
    assert resized == Model(disk_size, model.granularity, kept).built()
    assert bits_of(resized) == kept


@many
@given(models(), st.sampled_from([512, 1 * KIB, 2 * KIB, 8 * KIB, 64 * KIB, 1 * MIB]))
def test_with_granularity(model: Model, granularity: int) -> None:
    changed = model.built().with_granularity(granularity)
    expected = model_of_sectors(model.sectors(), model.disk_size, granularity)
    assert changed == expected.built()
    assert bits_of(changed) == expected.bits


@many
@given(models(), small_sizes, granularities)
def test_with_geometry_keeps_exactly_the_dirty_bytes(
    model: Model, disk_size: int, granularity: int
) -> None:
    changed = model.built().with_geometry(disk_size, granularity)
    kept = {sector for sector in model.sectors() if sector * 512 < disk_size}
    assert bits_of(changed) == model_of_sectors(kept, disk_size, granularity).bits


@many
@given(st.lists(models(), max_size=4), small_sizes, granularities)
def test_union_all(several: list[Model], disk_size: int, granularity: int) -> None:
    union = union_all([model.built() for model in several], disk_size, granularity)
    dirty = {sector for model in several for sector in model.sectors()}
    kept = {sector for sector in dirty if sector * 512 < disk_size}
    assert bits_of(union) == model_of_sectors(kept, disk_size, granularity).bits


@many
@given(models(), st.data())
def test_packed_range_and_dirty_parts(model: Model, data: st.DataObject) -> None:
    bitset = model.built()
    start = data.draw(st.integers(0, 100))
    length = data.draw(st.integers(0, 200))
    padded = model.packed() + bytes(300)
    assert bitset.packed_range(start, length).tobytes() == padded[start : start + length]
    part = data.draw(st.sampled_from([1, 2, 16, 512]))
    assert bitset.dirty_parts(part).tolist() == sorted({bit // 8 // part for bit in model.bits})


@many
@given(models(), st.lists(st.integers(1, 30), max_size=8))
def test_from_segments(model: Model, lengths: list[int]) -> None:
    packed = np.frombuffer(model.packed() + bytes(16), np.uint8)
    segments, at = [], 0
    for length in [*lengths, len(packed)]:
        piece = packed[at : at + length]
        if piece.any():
            segments.append((at, piece))
        at += length
    assert BitSet.from_segments(segments, model.disk_size, model.granularity) == model.built()


@given(chunky_bits, chunky_bits, st.sampled_from([1 * KIB, 64 * KIB, 32 * MIB]))
def test_sets_that_pass_chunks(ones: set[int], others: set[int], granularity: int) -> None:
    one, other = chunky_model(ones), chunky_model(others)
    union = one.built().union(other.built())
    assert bits_of(union) == one.bits | other.bits
    coarse = union.with_granularity(granularity)
    ratio = granularity // CHUNKY_GRANULARITY
    assert bits_of(coarse) == {bit // ratio for bit in ones | others}
    fine = coarse.with_granularity(CHUNKY_GRANULARITY)
    assert fine.covers(union)
    assert fine.dirty_bytes() == coarse.dirty_bytes()
    starts, lengths = union.ranges()
    again = BitSet.from_range_arrays(starts, lengths, union.disk_size, union.granularity)
    assert again == union
    assert int(lengths.sum()) == union.dirty_bytes()
    cut = union.with_disk_size(CHUNK_BITS * CHUNKY_GRANULARITY)
    assert bits_of(cut) == {bit for bit in ones | others if bit < CHUNK_BITS}
    assert union.dirty_parts(512).tolist() == sorted({bit // 8 // 512 for bit in ones | others})
    piece = union.packed_range(64 * KIB - 4, 8).tobytes()
    assert piece == union.to_packed()[64 * KIB - 4 : 64 * KIB + 4].tobytes()


def test_a_fully_dirty_disk() -> None:
    size = 3 * CHUNK_BITS * 512 + 512
    full = BitSet.from_ranges([(0, size)], size, 512)
    assert full.count() == full.bits == 3 * CHUNK_BITS + 1
    assert full.to_packed().tobytes() == b"\xff" * (3 * 64 * KIB) + b"\x01"
    assert full == BitSet.from_packed(full.to_packed(), size, 512)
    assert [array.tolist() for array in full.ranges()] == [[0], [size]]
    assert full.with_granularity(64 * KIB).with_granularity(512) == full
    assert full.with_disk_size(size - 512).count() == 3 * CHUNK_BITS
    assert full.with_disk_size(size + 512).count() == full.count()


def test_extending_keeps_what_lies_beyond_the_old_end_clean() -> None:
    # One granule of 64 KiB reaches over the end of the disk at 100 KiB.
    bitset = BitSet.from_ranges([(64 * KIB, 36 * KIB)], 100 * KIB, 64 * KIB)
    fine = bitset.with_geometry(200 * KIB, 4 * KIB)
    assert [array.tolist() for array in fine.ranges()] == [[64 * KIB], [36 * KIB]]


def test_large_sparse_sets_cost_nothing() -> None:
    # Dense, each of these would take 320 MiB: the whole list 320 GiB.
    bitsets = [
        BitSet.from_ranges([(number << 30, 4 * KIB)], 10 * TIB, 4 * KIB) for number in range(1000)
    ]
    assert sum(bitset.count() for bitset in bitsets) == 1000
    union = union_all(bitsets, 10 * TIB, 4 * KIB)
    assert union.dirty_bytes() == 1000 * 4 * KIB
    assert union.ranges()[0].tolist() == [number << 30 for number in range(1000)]
    assert union.covers(bitsets[7])
    assert not bitsets[7].covers(union)
    assert BitSet.empty(10 * TIB, 4 * KIB).with_granularity(64 * KIB).is_empty


def test_geometry_is_checked() -> None:
    with pytest.raises(ValueError, match="power of two"):
        BitSet.empty(1 * MIB, 3000)
    with pytest.raises(ValueError, match="power of two"):
        BitSet.empty(1 * MIB, 0)
    with pytest.raises(ValueError, match="cannot have"):
        BitSet.empty(-1, 512)
    with pytest.raises(ValueError, match="not the bits of a disk"):
        BitSet.from_packed(bytes(3), 1 * MIB, 64 * KIB)
    with pytest.raises(ValueError, match="same granules"):
        BitSet.empty(1 * MIB, 512).union(BitSet.empty(1 * MIB, 1024))
    with pytest.raises(ValueError, match="same granules"):
        BitSet.empty(1 * MIB, 512).covers(BitSet.empty(2 * MIB, 512))


def test_a_set_is_never_larger_than_qemu_stores() -> None:
    largest = MAX_PACKED_SIZE * 8 * 512
    assert is_storable(largest, 512)
    assert BitSet.empty(largest, 512).is_empty
    assert not is_storable(largest + 512, 512)
    with pytest.raises(ValueError, match="more bits than"):
        BitSet.empty(largest + 512, 512)


def test_sets_cannot_be_changed() -> None:
    bitset = BitSet.from_ranges([(0, 512)], 1 * MIB, 512)
    with pytest.raises(AttributeError):
        bitset.disk_size = 0  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        next(iter(bitset._chunks.values()))[0] = 0
    assert hash(bitset) == hash(BitSet.from_ranges([(0, 512)], 1 * MIB, 512))
    assert bitset != "bits"
