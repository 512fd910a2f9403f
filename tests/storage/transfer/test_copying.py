# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import random
import threading
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainmerge.errors import Interrupted
from chainmerge.qcow2.readable import BytesReadable
from chainmerge.storage import block
from chainmerge.storage.errors import FlushFailed, NoSpaceLeft, ReadBackDiffers, ReadFailed
from chainmerge.storage.files import FileReadable, WritablePort
from chainmerge.storage.transfer import files as file_transfer
from chainmerge.storage.transfer.copying import (
    ByteSource,
    FileTransfer,
    PortTransfer,
    Produced,
    ReadBack,
    Stretch,
    Transfer,
    TransferPort,
    transfer_into,
)
from chainmerge.storage.transfer.direct import DirectFile
from chainmerge.storage.transfer.pieces import joined_items
from tests.support.crash import RecordingPort, Written
from tests.support.loopdev import (
    device_that_loses_writes,
    loop_device,
    mounted_file_system,
    mounted_ramfs,
    mounted_tmpfs,
)
from tests.support.qemu import run

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

KIB: Final = 1 << 10
MIB: Final = 1 << 20
TARGET_BYTES: Final = 2 * MIB
SOURCE_BYTES: Final = MIB

KINDS: Final = ("ext4", "xfs", "btrfs", "tmpfs", "ramfs", "sectors of 512", "sectors of 4096")


def pattern(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


@dataclass
class Place:
    """Where targets and sources are made; a device is one target that is used again."""

    directory: Path
    device: Path | None = None

    def target(self, content: bytes) -> Path:
        path = self.device or self.directory / "target"
        with path.open("r+b" if self.device else "wb") as file:
            file.write(content)
            os.fsync(file.fileno())
        return path

    def source(self, name: str, content: bytes) -> Path:
        path = self.directory / name
        path.write_bytes(content)
        return path


@pytest.fixture(scope="module")
def places(
    file_systems: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Place]]:
    directory = tmp_path_factory.mktemp("places")
    with ExitStack() as stack:
        found = {kind: Place(file_systems[kind]) for kind in ("ext4", "xfs", "btrfs")}
        found["tmpfs"] = Place(stack.enter_context(mounted_tmpfs(directory, 32 * MIB)))
        found["ramfs"] = Place(stack.enter_context(mounted_ramfs(directory)))
        for sector in (512, 4096):
            device = stack.enter_context(
                loop_device(directory / f"device-{sector}", TARGET_BYTES, sector_size=sector)
            )
            found[f"sectors of {sector}"] = Place(directory, device)
        yield found
        for kind in ("ext4", "xfs", "btrfs"):
            for path in file_systems[kind].iterdir():
                if path.is_file():
                    path.unlink()


@pytest.fixture
def place(request: pytest.FixtureRequest, places: dict[str, Place]) -> Place:
    return places[request.param]


on_every_kind = pytest.mark.parametrize("place", KINDS, indirect=True)


@dataclass
class Watch:
    """What a caller sees, and when it wants to stop."""

    stop_after: int | None = None
    progress: list[int] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    asked: int = 0

    def on_progress(self, done: int) -> None:
        self.progress.append(done)
        self.threads.add(threading.get_ident())

    def should_stop(self) -> bool:
        self.asked += 1
        return self.stop_after is not None and self.asked > self.stop_after


def watched(
    port: TransferPort,
    watch: Watch | None = None,
    bandwidth: int | None = None,
    read_back: ReadBack = ReadBack.COMPARED,
) -> Transfer:
    watch = watch or Watch()
    return transfer_into(
        port,
        on_progress=watch.on_progress,
        should_stop=watch.should_stop,
        bandwidth=bandwidth,
        read_back=read_back,
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


def produced(at: int, data: bytes) -> Produced:
    return Produced(at, len(data), lambda: data)


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


class TestVerify:
    @on_every_kind
    @pytest.mark.parametrize("flipped", [700, 5000, 299_999, 1_000_000])
    def test_finds_one_flipped_bit(self, place: Place, flipped: int) -> None:
        path = place.target(pattern(1, TARGET_BYTES))
        # With this source nothing can be shared, which would not be read.
        source = BytesReadable("source", pattern(2, 300_000))
        with WritablePort(path) as port, closing(watched(port)) as transfer:
            transfer.move([Stretch(512, 299_488, source, 0), Stretch(300_000, MIB, None, 0)])
            port.flush()
            compared: list[int] = []
            transfer.verify(compared.append)
            assert compared[-1] == 299_488 + MIB
            with path.open("r+b") as behind:
                behind.seek(flipped)
                byte = behind.read(1)[0]
                behind.seek(flipped)
                behind.write(bytes([byte ^ 4]))
            with pytest.raises(ReadBackDiffers) as caught:
                transfer.verify()
        assert caught.value.image == str(path)
        assert caught.value.offset <= flipped < caught.value.offset + caught.value.length

    def test_reads_the_storage_and_not_the_page_cache(self, tmp_path: Path) -> None:
        backing = tmp_path / "backing"
        source = BytesReadable("source", pattern(2, MIB))
        with (
            loop_device(backing, TARGET_BYTES) as device,
            WritablePort(device) as port,
            closing(watched(port)) as transfer,
        ):
            transfer.move([Stretch(0, MIB, source, 0)])
            port.flush()
            assert port.read(0, MIB) == source.data
            with backing.open("r+b") as behind:
                behind.seek(123_456)
                behind.write(bytes(8))
            assert port.read(0, MIB) == source.data  # the device's page cache does not know
            with pytest.raises(ReadBackDiffers):
                transfer.verify()

    @on_every_kind
    def test_omitted_reads_nothing(self, place: Place) -> None:
        path = place.target(pattern(1, TARGET_BYTES))
        source = BytesReadable("source", pattern(2, MIB))
        compared: list[int] = []
        with (
            WritablePort(path) as port,
            closing(watched(port, read_back=ReadBack.OMITTED)) as transfer,
        ):
            transfer.move([Stretch(0, MIB, source, 0), Stretch(MIB, MIB, None, 0)])
            port.flush()
            with path.open("r+b") as behind:
                behind.write(bytes(8))
            transfer.verify(compared.append)
            assert port.read(8, MIB - 8) == source.data[8:]
        assert not compared

    def test_a_target_that_became_shorter(self, tmp_path: Path) -> None:
        path = Place(tmp_path).target(b"")
        with WritablePort(path) as port, closing(watched(port)) as transfer:
            transfer.move([Stretch(0, MIB, BytesReadable("source", pattern(2, MIB)), 0)])
            port.flush()
            os.truncate(path, MIB - 1)
            with pytest.raises(ReadBackDiffers):
                transfer.verify()

    def test_covers_all_moves_and_can_be_stopped(self, tmp_path: Path) -> None:
        path = Place(tmp_path).target(b"")
        watch = Watch()
        source = BytesReadable("source", pattern(2, MIB))
        with WritablePort(path) as port, closing(watched(port, watch)) as transfer:
            transfer.move([Stretch(MIB, MIB, source, 0)])
            transfer.move([Stretch(0, MIB, source, 0)])
            assert watch.progress[-1] == 2 * MIB
            port.flush()
            compared: list[int] = []
            transfer.verify(compared.append)
            assert compared[-1] == 2 * MIB
            watch.stop_after = watch.asked
            with pytest.raises(Interrupted):
                transfer.verify()


class TestDirectIo:
    @pytest.mark.parametrize("place", ["ext4", "xfs"], indirect=True)
    def test_leaves_the_page_cache_alone(self, place: Place) -> None:
        target = place.target(bytes(TARGET_BYTES))
        with (
            FileReadable(place.source("one", pattern(1, SOURCE_BYTES))) as source,
            WritablePort(target) as port,
        ):
            for file in (source, port):
                os.fsync(file.fd)
                os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            with closing(watched(port)) as transfer:
                transfer.move([Stretch(4096, SOURCE_BYTES - 8192, Unshared(source), 4096)])
                port.flush()
                transfer.verify()
            assert cached_pages(port) == cached_pages(source) == 0
            port.flush()
            assert port.read(4096, SOURCE_BYTES - 8192) == source.read(4096, SOURCE_BYTES - 8192)
            assert cached_pages(port) > 0  # the measurement can see them

    @pytest.mark.parametrize("place", ["ext4", "xfs"], indirect=True)
    def test_is_used_between_ends_that_are_not_aligned(self, place: Place) -> None:
        with (
            FileReadable(place.source("one", pattern(1, SOURCE_BYTES))) as source,
            WritablePort(place.target(bytes(TARGET_BYTES))) as port,
        ):
            for file in (source, port):
                os.fsync(file.fd)
                os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            with closing(watched(port)) as transfer:
                transfer.move([Stretch(8192 + 1000, SOURCE_BYTES - 2000, Unshared(source), 1000)])
            # The kernel reads ahead, but not everything.
            assert cached_pages(port) <= 2
            assert cached_pages(source) < SOURCE_BYTES // 4096 // 2

    def test_is_done_without_where_it_is_refused(self, tmp_path: Path) -> None:
        with mounted_ramfs(tmp_path) as directory:
            path = Place(directory).target(b"")
            with WritablePort(path) as port, closing(DirectFile(port, os.O_RDWR)) as file:
                assert not file.is_direct

    def test_a_device_that_refuses_it_halfway(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It has larger sectors than it says."""
        with (
            loop_device(tmp_path / "s", TARGET_BYTES, sector_size=4096) as source_device,
            loop_device(tmp_path / "t", TARGET_BYTES, sector_size=4096) as target_device,
        ):
            source_device.write_bytes(pattern(1, TARGET_BYTES))
            monkeypatch.setattr(block, "logical_sector_size", lambda fd: 512)
            with FileReadable(source_device) as source, WritablePort(target_device) as port:
                items = [Stretch(at, 1536, source, at) for at in range(512, MIB, 2048)]
                with closing(watched(port)) as transfer:
                    transfer.move(items)
                    port.flush()
                    transfer.verify()
                for item in items:
                    assert port.read(item.target, 1536) == source.read(item.offset, 1536)

    def test_uses_the_file_that_is_open_whatever_has_its_name(self, tmp_path: Path) -> None:
        place = Place(tmp_path)
        wanted = pattern(1, SOURCE_BYTES)
        path = place.target(b"")
        with FileReadable(place.source("one", wanted)) as source, WritablePort(path) as port:
            (tmp_path / "one").unlink()
            place.source("one", b"another")
            path.rename(tmp_path / "renamed")
            place.target(b"another")
            with closing(watched(port)) as transfer:
                transfer.move([Stretch(0, SOURCE_BYTES, source, 0)])
        assert (tmp_path / "renamed").read_bytes() == wanted
        assert path.read_bytes() == b"another"


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


class TestStopping:
    def test_what_is_not_begun_is_left_out(self, tmp_path: Path) -> None:
        taken: list[int] = []

        def items() -> Iterator[Produced]:
            for number in range(1000):
                taken.append(number)
                yield Produced(2 * number * MIB, MIB, lambda: bytes(MIB))

        path = Place(tmp_path).target(b"")
        watch = Watch(stop_after=20)
        with WritablePort(path) as port, closing(watched(port, watch)) as transfer:
            with pytest.raises(Interrupted):
                transfer.move(items())
            assert port.size == path.stat().st_size
        assert 0 < len(taken) < 1000
        assert watch.threads == {threading.get_ident()}

    @pytest.mark.parametrize("kind", ["file", "port"])
    def test_a_wait_for_bandwidth_is_no_obstacle(self, tmp_path: Path, kind: str) -> None:
        """The second chunk's turn would come in more than a day."""
        source = BytesReadable("source", bytes(MIB))
        items = [Stretch(at, 64 * KIB, source, 0) for at in range(0, 128 * MIB, 2 * MIB)]
        with WritablePort(Place(tmp_path).target(b"")) as file:
            port: TransferPort = file if kind == "file" else RecordingPort(b"")
            watch = Watch(stop_after=4)
            with (
                closing(watched(port, watch, bandwidth=1)) as transfer,
                pytest.raises(Interrupted),
            ):
                transfer.move(items)
            assert watch.asked == 5

    @pytest.mark.parametrize("kind", ["file", "port"])
    def test_bandwidth_is_kept(self, tmp_path: Path, kind: str) -> None:
        source = BytesReadable("source", bytes(MIB))
        with WritablePort(Place(tmp_path).target(b"")) as file:
            port: TransferPort = file if kind == "file" else RecordingPort(b"")
            begun = time.monotonic()
            with closing(watched(port, bandwidth=16 * MIB)) as transfer:
                for at in range(4):
                    transfer.move([Stretch(at * MIB, MIB, source, 0)])
                # What the last chunk (2 MiB at most) uses up is felt by the next one only.
                assert time.monotonic() - begun > 2 / 16

    def test_after_an_error_nobody_works_any_more(self, tmp_path: Path) -> None:
        has_failed, may_end = threading.Event(), threading.Event()
        ended: list[bytes] = []

        def fail() -> bytes:
            has_failed.set()
            raise KeyError("no such thing")

        def take_long() -> bytes:
            assert has_failed.wait(60)
            may_end.wait(0.2)  # nobody sets it: long enough to be overtaken, were it possible
            ended.append(b"")
            return bytes(file_transfer.CHUNK)

        path = Place(tmp_path).target(b"")
        size = file_transfer.CHUNK
        with WritablePort(path) as port, closing(watched(port)) as transfer:
            with pytest.raises(KeyError):
                transfer.move([Produced(0, size, take_long), Produced(size, size, fail)])
            assert ended
            # And it can be tried again.
            transfer.move([Stretch(0, 2 * size, BytesReadable("source", b"x"), 0)])
            assert port.read(0, 2 * size) == b"x".ljust(2 * size, b"\0")

    def test_nothing_of_a_move_that_failed_is_written_by_the_next_one(self, tmp_path: Path) -> None:
        watch = Watch()
        size = file_transfer.CHUNK

        def until_one_is_done() -> Iterator[Produced]:
            at = 100
            while not watch.progress:
                yield produced(at, b"a" * size)
                at += size + 8192
            raise KeyError

        new = BytesReadable("source", b"b" * size)
        with (
            WritablePort(Place(tmp_path).target(b"")) as port,
            closing(watched(port, watch)) as transfer,
        ):
            with pytest.raises(KeyError):
                transfer.move(until_one_is_done())
            transfer.move([Stretch(0, size, new, 0)])
            assert port.read(0, size) == new.data

    def test_closing_gives_everything_back(self, tmp_path: Path) -> None:
        place = Place(tmp_path)
        with (
            FileReadable(place.source("one", pattern(1, MIB))) as source,
            WritablePort(place.target(b"")) as port,
        ):
            before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
            threads = set(threading.enumerate())
            transfer = watched(port)
            transfer.move([Stretch(0, MIB, source, 0)])
            assert set(threading.enumerate()) != threads
            transfer.close()
            transfer.close()
            assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
            assert set(threading.enumerate()) == threads


class TestErrors:
    @pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
    def test_no_space(self, tmp_path: Path, kind: str) -> None:
        with ExitStack() as stack:
            if kind == "tmpfs":
                directory = stack.enter_context(mounted_tmpfs(tmp_path, 4 * MIB))
            else:
                directory = stack.enter_context(mounted_file_system(tmp_path, kind, 16 * MIB))
            path = Place(directory).target(b"")
            port = stack.enter_context(WritablePort(path))
            transfer = stack.enter_context(closing(watched(port)))
            with pytest.raises(NoSpaceLeft) as caught:
                transfer.move(
                    [Stretch(0, 64 * MIB, BytesReadable("source", pattern(1, 64 * MIB)), 0)]
                )
            assert caught.value.image == str(path)
            assert 0 <= caught.value.offset < caught.value.offset + caught.value.length <= 64 * MIB
            with pytest.raises(NoSpaceLeft):
                transfer.move([Stretch(0, 64 * MIB, None, 0)])
            assert port.size == path.stat().st_size

    def test_a_source_that_cannot_be_read(self, tmp_path: Path) -> None:
        backing = tmp_path / "backing"
        with (
            loop_device(backing, 16 * MIB) as device,
            FileReadable(device) as source,
            WritablePort(Place(tmp_path).target(b"")) as port,
            closing(watched(port)) as transfer,
        ):
            os.truncate(backing, MIB)
            with pytest.raises(ReadFailed) as caught:
                transfer.move([Stretch(0, 16 * MIB, source, 0)])
        assert caught.value.image == str(device)
        assert caught.value.reason == "Input/output error"
        assert caught.value.offset + caught.value.length > MIB

    @pytest.mark.parametrize("left", [0, 300_000, 4096 * 50])
    @pytest.mark.parametrize("place", ["ext4", "xfs", "btrfs", "ramfs"], indirect=True)
    def test_a_source_that_became_shorter_reads_as_zeros(self, place: Place, left: int) -> None:
        content = pattern(1, SOURCE_BYTES)
        path = place.source("one", content)
        with FileReadable(path) as source, WritablePort(place.target(b"")) as port:
            os.truncate(path, left)
            with closing(watched(port)) as transfer:
                transfer.move([Stretch(0, SOURCE_BYTES, source, 0)])
                port.flush()
                transfer.verify()
            assert port.size == SOURCE_BYTES
            assert port.read(0, SOURCE_BYTES) == content[:left].ljust(SOURCE_BYTES, b"\0")

    @pytest.mark.parametrize("port_kind", ["file", "port"])
    def test_what_is_produced_must_be_as_long_as_promised(
        self, tmp_path: Path, port_kind: str
    ) -> None:
        with WritablePort(Place(tmp_path).target(b"")) as file:
            port: TransferPort = file if port_kind == "file" else RecordingPort(b"")
            with closing(watched(port)) as transfer, pytest.raises(ValueError, match="promised"):
                transfer.move([Produced(0, 100, lambda: bytes(99))])

    def test_after_a_flush_that_failed_nothing_is_written(self, tmp_path: Path) -> None:
        with (
            device_that_loses_writes(tmp_path, 4 * MIB, MIB) as device,
            WritablePort(device) as port,
            closing(watched(port)) as transfer,
        ):
            port.write(0, pattern(1, 4 * MIB))
            with pytest.raises(FlushFailed):
                port.flush()
            with pytest.raises(FlushFailed):
                transfer.move([Stretch(0, 1, None, 0)])
            with pytest.raises(FlushFailed):
                transfer.verify()


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


class Unshared(FileReadable):
    """A file that is taken for one on another file system."""

    def __init__(self, file: FileReadable) -> None:
        self.name = file.name
        self.fd = file.fd
        self.size = file.size
        self.identity = (-1, file.identity[1])
        self.is_block_device = file.is_block_device


def cached_pages(file: FileReadable) -> int:
    path = f"/proc/{os.getpid()}/fd/{file.fd}"
    return int(run("fincore", "--noheadings", "--output", "PAGES", path).stdout)
