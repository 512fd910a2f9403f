# SPDX-License-Identifier: Apache-2.0
"""What is copied is what a model says, on every kind of storage."""

import os
import random
import threading
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainmerge.errors import Interrupted
from chainmerge.qcow2.readable import BytesReadable
from chainmerge.storage.errors import ReadBackDiffers
from chainmerge.storage.files import FileReadable, WritablePort
from chainmerge.storage.transfer import files as file_transfer
from chainmerge.storage.transfer.copying import (
    ByteSource,
    FileTransfer,
    PortTransfer,
    Produced,
    Stretch,
)
from chainmerge.storage.transfer.direct import DirectFile
from chainmerge.storage.transfer.pieces import joined_items
from tests.storage.transfer.places import (
    KIB,
    KINDS,
    MIB,
    SOURCE_BYTES,
    TARGET_BYTES,
    Place,
    Watch,
    on_every_kind,
    pattern,
    produced,
    watched,
)
from tests.support.crash import RecordingPort, Written
from tests.support.loopdev import (
    loop_device,
)


@dataclass(frozen=True)
class Plan:
    """One item: the gap before it in the target, and what it is."""

    gap: int
    length: int
    kind: str
    offset: int


def lengths() -> st.SearchStrategy[int]:
    return st.one_of(
        st.integers(0, 9000),
        st.integers(0, 40).map(lambda blocks: blocks * 4096),
        st.integers(0, 40).map(lambda sectors: sectors * 512),
        st.integers(250 * KIB, 400 * KIB),
    )


plans = st.lists(
    st.builds(
        Plan,
        gap=st.one_of(st.just(0), lengths()),
        length=lengths(),
        kind=st.sampled_from(["one", "two", "memory", "zeros", "produced"]),
        offset=st.one_of(
            st.integers(0, SOURCE_BYTES + 5000),
            st.integers(0, SOURCE_BYTES // 4096).map(lambda blocks: blocks * 4096),
            st.just((1 << 63) - 4096),
        ),
    ),
    max_size=25,
)


def slice_of(content: bytes, offset: int, length: int) -> bytes:
    return content[offset : offset + length].ljust(length, b"\0")


def items_and_model(
    plan: list[Plan], sources: Mapping[str, ByteSource], before: bytes
) -> tuple[list[Stretch | Produced], bytes]:
    items: list[Stretch | Produced] = []
    model = bytearray(before)
    contents = {name: source.read(0, SOURCE_BYTES) for name, source in sources.items()}
    at = 0
    for number, step in enumerate(plan):
        at += step.gap
        if at + step.length > TARGET_BYTES:
            break
        if step.kind == "produced":
            data = pattern(number, step.length)
            items.append(produced(at, data))
        elif step.kind == "zeros":
            data = bytes(step.length)
            items.append(Stretch(at, step.length, None, 0))
        else:
            data = slice_of(contents[step.kind], step.offset, step.length)
            items.append(Stretch(at, step.length, sources[step.kind], step.offset))
        if data:
            model[len(model) :] = bytes(max(at - len(model), 0))
            model[at : at + len(data)] = data
        at += step.length
    return items, bytes(model)


@pytest.mark.parametrize("kind", KINDS)
@given(plan=plans, shuffle=st.randoms(use_true_random=False), short=st.booleans())
def test_moves_what_a_model_moves(
    places: dict[str, Place], kind: str, plan: list[Plan], shuffle: random.Random, short: bool
) -> None:
    place = places[kind]
    before = pattern(1, 100_001 if short and place.device is None else TARGET_BYTES)
    one = place.source("one", pattern(2, SOURCE_BYTES))
    two = place.source("two", pattern(3, SOURCE_BYTES - 777))
    with (
        pytest.MonkeyPatch.context() as patch,
        FileReadable(one) as first,
        FileReadable(two) as second,
        WritablePort(place.target(before)) as port,
    ):
        # So that pieces are cut, and several chunks are on their way.
        patch.setattr(file_transfer, "CHUNK", 128 * KIB)
        memory = BytesReadable("memory", pattern(4, SOURCE_BYTES))
        sources: dict[str, ByteSource] = {"one": first, "two": second, "memory": memory}
        items, model = items_and_model(plan, sources, before)
        shuffle.shuffle(items)
        watch = Watch()
        with closing(watched(port, watch)) as transfer:
            assert isinstance(transfer, FileTransfer)
            transfer.move(items)
            assert port.size == len(model)
            assert port.read(0, len(model)) == model
            port.flush()
            transfer.verify()
        total = sum(item.length for item in items)
        assert watch.progress == sorted(watch.progress)
        assert watch.progress[-1:] == ([total] if total else [])
    assert (place.device or place.directory / "target").read_bytes() == model


@given(plan=plans, shuffle=st.randoms(use_true_random=False))
def test_a_port_gets_what_a_model_gets(plan: list[Plan], shuffle: random.Random) -> None:
    before = pattern(1, 100_001)
    contents = {"one": pattern(2, SOURCE_BYTES), "two": pattern(3, 77_777), "memory": b"m" * 9999}
    sources = {name: BytesReadable(name, content) for name, content in contents.items()}
    port = RecordingPort(before)
    items, model = items_and_model(plan, sources, before)
    shuffle.shuffle(items)
    watch = Watch()
    transfer = watched(port, watch)
    assert isinstance(transfer, PortTransfer)
    transfer.move(items)
    transfer.verify()
    assert port.content == model
    total = sum(item.length for item in items)
    assert watch.progress == sorted(watch.progress)
    assert watch.progress[-1:] == ([total] if total else [])


def test_only_what_continues_in_source_and_target_is_joined() -> None:
    one, two = BytesReadable("one", b""), BytesReadable("two", b"")
    made = produced(60, b"12345")
    items: list[Stretch | Produced] = [
        Stretch(0, 10, one, 0),
        Stretch(10, 10, one, 10),
        Stretch(20, 0, two, 0),
        Stretch(20, 10, two, 20),
        Stretch(30, 10, two, 40),
        Stretch(50, 5, two, 50),
        Stretch(55, 5, None, 9),
        made,
        Stretch(65, 5, None, 0),
        Stretch(70, 5, None, 0),
    ]
    assert list(joined_items(items)) == [
        Stretch(0, 20, one, 0),
        Stretch(20, 10, two, 20),
        Stretch(30, 10, two, 40),
        Stretch(50, 5, two, 50),
        Stretch(55, 5, None, 9),
        made,
        Stretch(65, 10, None, 0),
    ]


def test_joining_comes_to_an_end() -> None:
    endless = (Stretch(at, MIB, None, 0) for at in count(0, MIB))
    assert next(joined_items(endless)).length == 64 * MIB


class TestPortTransfer:
    def test_writes_in_the_order_of_the_items_and_joins_neighbours(self) -> None:
        source = BytesReadable("source", pattern(1, 4 * MIB))
        port = RecordingPort(bytes(8 * MIB))
        items: list[Stretch | Produced] = [
            Stretch(5 * MIB, 1000, source, 7),
            Stretch(5 * MIB + 1000, 500, None, 0),
            Produced(5 * MIB + 1500, 10, lambda: b"produced!!"),
            Stretch(100, 2 * MIB + 5, source, 0),
            Stretch(3 * MIB, 1, source, 0),
        ]
        watched(port).move(items)
        writes = [
            (event.offset, len(event.data)) for event in port.log if isinstance(event, Written)
        ]
        assert writes == [
            (5 * MIB, 1510),
            (100, MIB),
            (100 + MIB, MIB),
            (100 + 2 * MIB, 5),
            (3 * MIB, 1),
        ]

    def test_verify_names_the_place(self) -> None:
        port = RecordingPort(bytes(MIB))
        transfer = watched(port)
        transfer.move([Stretch(1000, 5000, BytesReadable("source", b"x" * 5000), 0)])
        transfer.verify()
        port.content[4000] ^= 1
        with pytest.raises(ReadBackDiffers) as caught:
            transfer.verify()
        assert caught.value.facts == {"image": port.name, "offset": 1000, "length": 5000}

    def test_stops_when_asked(self) -> None:
        port = RecordingPort(b"")
        with pytest.raises(Interrupted):
            watched(port, Watch(stop_after=2)).move([Stretch(0, 8 * MIB, None, 0)])
        assert len(port.content) == 2 * MIB


class TestZeros:
    @on_every_kind
    def test_a_large_range_among_other_bytes(self, place: Place) -> None:
        before = pattern(1, TARGET_BYTES)
        with WritablePort(place.target(before)) as port, closing(watched(port)) as transfer:
            transfer.move([Stretch(1001, MIB, None, 0)])
            port.flush()
            transfer.verify()
            assert port.read(0, TARGET_BYTES) == before[:1001] + bytes(MIB) + before[1001 + MIB :]

    @pytest.mark.parametrize("place", ["ext4", "xfs", "btrfs"], indirect=True)
    def test_keep_their_space_and_are_not_written(self, place: Place) -> None:
        with WritablePort(place.target(b"")) as port:
            port.truncate_to(TARGET_BYTES)
            # Written at this rate they would take two seconds.
            with closing(watched(port, bandwidth=MIB)) as transfer:
                begun = time.monotonic()
                transfer.move([Stretch(0, TARGET_BYTES, None, 0)])
                assert time.monotonic() - begun < 1
            port.flush()
            assert os.fstat(port.fd).st_blocks * 512 >= TARGET_BYTES


class TestProduced:
    def test_is_made_elsewhere_and_may_be_larger_than_a_chunk(self, tmp_path: Path) -> None:
        threads: set[int] = set()
        content = pattern(1, 2 * file_transfer.CHUNK + 5)

        def produce() -> bytes:
            threads.add(threading.get_ident())
            return content

        with WritablePort(Place(tmp_path).target(b"")) as port, closing(watched(port)) as transfer:
            transfer.move([Produced(7, len(content), produce)])
            assert port.read(7, len(content)) == content
            port.flush()
            transfer.verify()
        assert threads
        assert threading.get_ident() not in threads

    def test_many_unaligned_pieces(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """More ends than are kept until later, and none of them written beside a direct write."""
        writing: list[int] = []
        write_direct, write = DirectFile.write, WritablePort.write

        def watched_direct(file: DirectFile, view: memoryview, offset: int) -> None:
            writing.append(offset)
            write_direct(file, view, offset)
            writing.remove(offset)

        def watched_plain(port: WritablePort, offset: int, data: bytes) -> None:
            assert not writing
            write(port, offset, data)

        monkeypatch.setattr(DirectFile, "write", watched_direct)
        monkeypatch.setattr(WritablePort, "write", watched_plain)
        pieces = [(at, pattern(at, 13_000)) for at in range(100, 32 * MIB, 16_000)]
        with (
            loop_device(tmp_path / "device", 33 * MIB) as device,
            WritablePort(device) as port,
            closing(watched(port)) as transfer,
        ):
            transfer.move(produced(at, data) for at, data in pieces)
            port.flush()
            transfer.verify()
            for at, data in pieces:
                assert port.read(at, len(data)) == data
            assert port.read(13_100, 3_000) == bytes(3_000)
