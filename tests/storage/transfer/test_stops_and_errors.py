# SPDX-License-Identifier: Apache-2.0
"""A copy that is stopped, slowed down, or meets an error."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from chainmerge.errors import Interrupted
from chainmerge.qcow2.readable import BytesReadable
from chainmerge.storage.errors import FlushFailed, NoSpaceLeft, ReadFailed
from chainmerge.storage.files import FileReadable, WritablePort
from chainmerge.storage.transfer import files as file_transfer
from chainmerge.storage.transfer.copying import (
    Produced,
    Stretch,
    TransferPort,
)
from tests.storage.transfer.places import (
    KIB,
    MIB,
    SOURCE_BYTES,
    Place,
    Watch,
    pattern,
    produced,
    watched,
)
from tests.support.crash import RecordingPort
from tests.support.loopdev import (
    device_that_loses_writes,
    loop_device,
    mounted_file_system,
    mounted_tmpfs,
)


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
