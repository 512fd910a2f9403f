# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import random
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Final

import pytest

from chainmerge.errors import Interrupted
from chainmerge.storage.errors import ReadBackDiffers
from chainmerge.storage.files import FileReadable, WritablePort
from chainmerge.storage.transfer import files as file_transfer
from chainmerge.storage.transfer import offload
from chainmerge.storage.transfer.copying import (
    ReadBack,
    Stretch,
    Transfer,
    can_reflink,
    transfer_into,
)
from tests.support.loopdev import loop_device, mounted_file_system
from tests.support.qemu import run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB: Final = 1 << 20
BLOCK: Final = 4096
CONTENT: Final = random.Random(1).randbytes(3 * MIB + 777)
SHARING: Final = ("xfs", "btrfs")


@contextmanager
def source_and_target(
    source_directory: Path, target_directory: Path
) -> Iterator[tuple[FileReadable, WritablePort]]:
    """A source with content and an empty target, which are removed afterwards."""
    source, target = source_directory / "source", target_directory / "target"
    source.write_bytes(CONTENT)
    target.touch()
    try:
        with FileReadable(source) as readable, WritablePort(target) as port:
            yield readable, port
    finally:
        source.unlink()
        target.unlink()


def transfer(port: WritablePort, progress: list[int], asked: int | None = None) -> Transfer:
    left = [asked]

    def should_stop() -> bool:
        if left[0] is None:
            return False
        left[0] -= 1
        return left[0] < 0

    return transfer_into(
        port,
        on_progress=progress.append,
        should_stop=should_stop,
        bandwidth=None,
        read_back=ReadBack.COMPARED,
    )


def shared_bytes(path: Path) -> int:
    """Bytes of a file whose blocks are another file's too."""
    total = 0
    for line in run("filefrag", "-b1", "-v", path).stdout.splitlines():
        fields = line.split(":")
        if len(fields) >= 4 and "shared" in fields[-1]:
            total += int(fields[3])
    return total


class TestSharing:
    @pytest.mark.parametrize("kind", SHARING)
    def test_whole_blocks_are_shared_and_the_rest_is_copied(
        self, file_systems: dict[str, Path], kind: str
    ) -> None:
        directory = file_systems[kind]
        with source_and_target(directory, directory) as (source, port):
            assert can_reflink(source, port)
            progress: list[int] = []
            with closing(transfer(port, progress)) as moving:
                moving.move([Stretch(MIB, len(CONTENT) + 5000, source, 0)])
                assert progress[-1] == len(CONTENT) + 5000
                port.flush()
                moving.verify()
            assert port.size == MIB + len(CONTENT) + 5000
            assert port.read(MIB, len(CONTENT) + 5000) == CONTENT + bytes(5000)
            assert shared_bytes(directory / "target") == len(CONTENT) // BLOCK * BLOCK

    @pytest.mark.parametrize("kind", SHARING)
    @pytest.mark.parametrize(("target", "offset"), [(512, 512), (0, 512), (512, 0), (0, 1)])
    def test_what_is_not_aligned_is_copied(
        self, file_systems: dict[str, Path], kind: str, target: int, offset: int
    ) -> None:
        directory = file_systems[kind]
        with source_and_target(directory, directory) as (source, port):
            with closing(transfer(port, [])) as moving:
                moving.move([Stretch(target, MIB, source, offset)])
                # And that says nothing about the next one.
                moving.move([Stretch(2 * MIB, MIB, source, MIB)])
            assert port.read(target, MIB) == CONTENT[offset : offset + MIB]
            assert port.read(2 * MIB, MIB) == CONTENT[MIB : 2 * MIB]
            assert shared_bytes(directory / "target") == MIB

    @pytest.mark.parametrize("kind", SHARING)
    def test_stops_between_two_requests(
        self, file_systems: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(file_transfer, "_CLONE_BYTES", MIB)
        directory = file_systems[kind]
        with source_and_target(directory, directory) as (source, port):
            progress: list[int] = []
            with closing(transfer(port, progress, asked=2)) as moving, pytest.raises(Interrupted):
                moving.move([Stretch(0, len(CONTENT), source, 0)])
            assert progress == [MIB, 2 * MIB]
            assert port.size == 2 * MIB
            assert port.read(0, 2 * MIB) == CONTENT[: 2 * MIB]

    def test_shared_ranges_are_not_read_back(self, file_systems: dict[str, Path]) -> None:
        directory = file_systems["xfs"]
        with (
            source_and_target(directory, directory) as (source, port),
            closing(transfer(port, [])) as moving,
        ):
            moving.move([Stretch(0, MIB, source, 0)])
            port.write(5000, b"changed")
            port.flush()
            compared: list[int] = []
            moving.verify(compared.append)
            assert compared == []

    def test_is_given_up_for_a_pair_that_cannot(
        self, file_systems: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ext4 cannot share; and only one file of two may be on another file system."""
        requests: list[int] = []
        clone = offload.clone_range

        def counted(
            source: FileReadable, offset: int, target: FileReadable, at: int, length: int
        ) -> None:
            requests.append(length)
            clone(source, offset, target, at, length)

        monkeypatch.setattr(offload, "clone_range", counted)
        directory = file_systems["ext4"]
        with source_and_target(directory, directory) as (source, port):
            assert not can_reflink(source, port)
            with closing(transfer(port, [])) as moving:
                moving.move([Stretch(at, BLOCK, source, at) for at in (0, 2 * BLOCK, 8 * BLOCK)])
            assert requests == [BLOCK]
            for at in (0, 2 * BLOCK, 8 * BLOCK):
                assert port.read(at, BLOCK) == CONTENT[at : at + BLOCK]


class TestCanReflink:
    def test_not_across_file_systems(self, file_systems: dict[str, Path], tmp_path: Path) -> None:
        for other in (file_systems["btrfs"], tmp_path):
            with source_and_target(file_systems["xfs"], other) as (source, port):
                assert not can_reflink(source, port)

    def test_not_on_an_xfs_that_was_made_without(self, tmp_path: Path) -> None:
        options = ("-m", "reflink=0,rmapbt=0")
        with (
            mounted_file_system(tmp_path, "xfs", 300 * MIB, *options) as directory,
            source_and_target(directory, directory) as (source, port),
        ):
            assert not can_reflink(source, port)
            with closing(transfer(port, [])) as moving:
                moving.move([Stretch(0, MIB, source, 0)])
            assert port.read(0, MIB) == CONTENT[:MIB]

    def test_not_between_checksummed_and_other_files_of_btrfs(
        self, file_systems: dict[str, Path]
    ) -> None:
        directory = file_systems["btrfs"]
        with source_and_target(directory, directory) as (source, port):
            run("chattr", "+C", directory / "target")
            assert not can_reflink(source, port)
            with closing(transfer(port, [])) as moving:
                moving.move([Stretch(0, MIB, source, 0)])
            assert shared_bytes(directory / "target") == 0
            assert port.read(0, MIB) == CONTENT[:MIB]

    def test_not_with_block_devices(self, tmp_path: Path) -> None:
        with (
            loop_device(tmp_path / "backing", MIB) as device,
            FileReadable(device) as source,
            WritablePort(device) as port,
        ):
            assert not can_reflink(source, port)


class TestServerCopy:
    def test_is_for_network_storage_only(self, file_systems: dict[str, Path]) -> None:
        for directory in file_systems.values():
            with source_and_target(directory, directory) as (source, port):
                assert not offload.server_copies(source, port)

    def test_copies_and_is_compared_with_the_source(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The kernel's copy between two files, as if they were on such storage."""
        monkeypatch.setattr(offload, "server_copies", lambda source, target: True)
        monkeypatch.setattr(file_transfer, "_SERVER_COPY_BYTES", MIB)
        copied = count_copies(monkeypatch)
        with source_and_target(tmp_path, tmp_path) as (source, port):
            progress: list[int] = []
            with closing(transfer(port, progress)) as moving:
                moving.move([Stretch(100, len(CONTENT) + 5000, source, 0)])
                assert sum(copied) == len(CONTENT)
                assert progress[-1] == port.size - 100 == len(CONTENT) + 5000
                assert port.read(100, len(CONTENT) + 5000) == CONTENT + bytes(5000)
                port.flush()
                compared: list[int] = []
                moving.verify(compared.append)
                assert compared[-1] == len(CONTENT) + 5000
                port.write(2 * MIB, bytes([CONTENT[2 * MIB - 100] ^ 1]))
                port.flush()
                with pytest.raises(ReadBackDiffers):
                    moving.verify()

    def test_is_given_up_where_it_fails(
        self,
        file_systems: dict[str, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Between file systems of two types the kernel refuses it."""
        monkeypatch.setattr(offload, "server_copies", lambda source, target: True)
        copied = count_copies(monkeypatch)
        with source_and_target(tmp_path, file_systems["xfs"]) as (source, port):
            with closing(transfer(port, [])) as moving:
                moving.move([Stretch(0, MIB, source, 0), Stretch(2 * MIB, MIB, source, MIB)])
            assert copied == [-1]
            assert port.read(0, MIB) == CONTENT[:MIB]
            assert port.read(2 * MIB, MIB) == CONTENT[MIB : 2 * MIB]


def count_copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each copy that the kernel makes from now on; -1 for one that it refuses."""
    copied: list[int] = []
    copy = os.copy_file_range

    def counted(*arguments: int) -> int:
        copied.append(-1)
        copied[-1] = copy(*arguments)
        return copied[-1]

    monkeypatch.setattr(os, "copy_file_range", counted)
    return copied
