# SPDX-License-Identifier: Apache-2.0
"""What was written is read back, past the page cache where that can be."""

import os
from contextlib import closing
from pathlib import Path

import pytest

from chainmerge.errors import Interrupted
from chainmerge.qcow2.readable import BytesReadable
from chainmerge.storage import block
from chainmerge.storage.errors import ReadBackDiffers
from chainmerge.storage.files import FileReadable, WritablePort
from chainmerge.storage.transfer.copying import (
    ReadBack,
    Stretch,
)
from chainmerge.storage.transfer.direct import DirectFile
from tests.storage.transfer.places import (
    MIB,
    SOURCE_BYTES,
    TARGET_BYTES,
    Place,
    Watch,
    on_every_kind,
    pattern,
    watched,
)
from tests.support.loopdev import (
    loop_device,
    mounted_ramfs,
)
from tests.support.qemu import run


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
