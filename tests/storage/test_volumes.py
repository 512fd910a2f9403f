# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chainmerge.storage.errors import FlushFailed, ImageMissing, ImageReadOnly, WrongFileType
from chainmerge.storage.files import WritablePort
from chainmerge.storage.volume_errors import (
    CannotShrink,
    DeviceTooSmall,
    DiscardFailed,
    ExtensionRefused,
    FileLimitReached,
    FileSystemFull,
    LvmFailed,
    LvmMissing,
    NotALogicalVolume,
    VolumeGroupFull,
    VolumeNotExtensible,
)
from chainmerge.storage.volume_facts import VolumeFacts, VolumeKind
from chainmerge.storage.volumes import (
    BlockVolume,
    FileVolume,
    LvmVolume,
    open_lvm_volume,
    open_volume,
)
from tests.support.fake_lvm import FakeLvm
from tests.support.loopdev import (
    device_that_loses_writes,
    loop_device,
    mounted_ramfs,
    mounted_tmpfs,
)
from tests.support.qemu import run

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
EXTENT = 4 * MIB


def content_of(size: int) -> bytes:
    return (b"image" * (size // 5 + 1))[:size]


def make_file(path: Path, size: int) -> Path:
    path.write_bytes(content_of(size))
    return path


def path_of_backing_file(loop_device: Path) -> Path:
    return Path(Path(f"/sys/block/{loop_device.name}/loop/backing_file").read_text().rstrip("\n"))


def sync(directory: Path) -> None:
    run("sync", "--file-system", directory)


def space_left(directory: Path) -> int:
    sync(directory)  # Btrfs counts what is free when it commits
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


class TestFacts:
    @given(
        size=st.integers(0, 1 << 50),
        required=st.integers(0, 1 << 50),
        unit=st.integers(0, 30).map(lambda exponent: 1 << exponent),
    )
    def test_growth_is_the_least_that_suffices(self, size: int, required: int, unit: int) -> None:
        facts = VolumeFacts("v", VolumeKind.LVM, size, None, None, unit)
        after = facts.growth(required).size_after
        assert after >= max(required, size)
        assert (after - size) % unit == 0
        assert after == size or after - unit < required
        assert facts.growth(required).missing == 0
        assert facts.refusal(required) is None

    @pytest.mark.parametrize(
        ("kind", "limit", "free", "required", "missing", "error"),
        [
            (VolumeKind.FILE, None, None, 1 << 60, 0, None),
            (VolumeKind.FILE, None, 0, 1000, 0, None),
            (VolumeKind.FILE, None, 50, 1050, 0, None),
            (VolumeKind.FILE, None, 50, 1051, 1, FileSystemFull),
            (VolumeKind.FILE, 1100, 50, 1051, 1, FileSystemFull),
            (VolumeKind.FILE, 1100, 500, 1101, 1, FileLimitReached),
            (VolumeKind.FILE, 1100, 50, 1150, 100, FileSystemFull),
            (VolumeKind.FILE, 1020, 50, 1150, 130, FileLimitReached),
            # A limit below what the file has already does not take that away.
            (VolumeKind.FILE, 500, 50, 1000, 0, None),
            (VolumeKind.FILE, 500, 50, 1001, 501, FileLimitReached),
            (VolumeKind.BLOCK, 1000, None, 1000, 0, None),
            (VolumeKind.BLOCK, 1000, None, 1001, 1, DeviceTooSmall),
            (VolumeKind.LVM, 3000, None, 3000, 0, None),
            (VolumeKind.LVM, 3000, None, 3100, 100, VolumeGroupFull),
        ],
    )
    def test_what_is_missing(
        self,
        kind: VolumeKind,
        limit: int | None,
        free: int | None,
        required: int,
        missing: int,
        error: type[Exception] | None,
    ) -> None:
        facts = VolumeFacts("v", kind, 1000, limit, free, 1)
        assert facts.growth(required).missing == missing
        refusal = facts.refusal(required)
        assert type(refusal) is (error or type(None))
        if refusal is not None:
            assert refusal.missing == missing
            assert str(missing) in refusal.sentence
            assert refusal.exit_code == 3


class TestOpening:
    def test_by_what_is_there(self, tmp_path: Path) -> None:
        image = make_file(tmp_path / "image", 100)
        assert open_volume(image) == FileVolume(str(image))
        assert open_volume(image, 500) == FileVolume(str(image), 500)
        with loop_device(tmp_path / "backing", MIB) as device:
            assert open_volume(device) == BlockVolume(str(device))

    def test_what_is_no_volume(self, tmp_path: Path) -> None:
        with pytest.raises(ImageMissing):
            open_volume(tmp_path / "none")
        with pytest.raises(WrongFileType):
            open_volume(tmp_path)


@pytest.fixture(params=["xfs", "btrfs", "ext4"])
def directory(file_systems: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty directory on a file system that can reserve space."""
    mounted = file_systems[request.param]
    directory = mounted / "volumes"
    directory.mkdir()
    yield directory
    for leftover in directory.iterdir():
        leftover.unlink()
    directory.rmdir()


class TestFile:
    def test_growth_is_reserved_and_keeps_content_and_size(self, directory: Path) -> None:
        # Whole blocks, for Btrfs would have to write the last one to a new place.
        image = make_file(directory / "image", 3 * 4096)
        content, before = image.read_bytes(), space_left(directory)
        volume = FileVolume(str(image))
        volume.grow_to(20 * MIB)
        volume.make_growth_durable()
        assert volume.size == 3 * 4096
        assert image.read_bytes() == content
        assert before - space_left(directory) >= 19 * MIB
        # Others take all the rest, and there still is what was reserved.
        self._fill(directory)
        with WritablePort(image) as port:
            # Samples: a full Btrfs writes 1 MiB a second.
            for offset in range(3 * 4096, 20 * MIB - 4096, MIB):
                port.write(offset, b"z" * 4096)
            port.write(20 * MIB - 4096, b"z" * 4096)
            port.flush()

    def test_growing_again_takes_nothing_more(self, directory: Path) -> None:
        volume = FileVolume(str(make_file(directory / "image", 10_001)))
        room = volume.facts().free_bytes
        volume.grow_to(20 * MIB)
        reserved = space_left(directory)
        volume.grow_to(20 * MIB)
        volume.grow_to(10 * MIB)
        assert space_left(directory) == reserved
        # A rerun may not be refused for want of the space that the first run has reserved.
        assert room is not None
        assert volume.facts().free_bytes == pytest.approx(room, abs=MIB)

    def test_what_is_not_there_is_refused_and_nothing_kept(self, directory: Path) -> None:
        image = make_file(directory / "image", 10_001)
        content, before = image.read_bytes(), space_left(directory)
        volume = FileVolume(str(image))
        with pytest.raises(FileSystemFull) as caught:
            volume.grow_to(10 << 30)
        expected = (10 << 30) - 10_001 - before
        assert caught.value.missing == pytest.approx(expected, abs=MIB)
        assert caught.value.missing > 0
        assert (caught.value.size, caught.value.required) == (10_001, 10 << 30)
        assert space_left(directory) >= before - MIB
        assert volume.size == 10_001
        assert image.read_bytes() == content

    def test_a_plan_foresees_it(self, directory: Path) -> None:
        volume = FileVolume(str(make_file(directory / "image", 10_001)))
        facts = volume.facts()
        assert facts.growth(MIB).missing == 0
        assert isinstance(facts.refusal(10 << 30), FileSystemFull)
        assert (facts.kind, facts.size, facts.capacity_limit) == (VolumeKind.FILE, 10_001, None)

    def test_giving_the_rest_back(self, directory: Path) -> None:
        volume = FileVolume(str(make_file(directory / "image", 10_001)))
        volume.grow_to(20 * MIB)
        with WritablePort(volume.path) as port:
            port.write(10_001, b"z" * 10_000)
        volume.release_reservation()
        assert volume.size == 20_001
        assert Path(volume.path).read_bytes()[10_001:] == b"z" * 10_000
        sync(directory)
        assert Path(volume.path).stat().st_blocks * 512 <= 6 * 4096

    def test_giving_all_of_it_back(self, directory: Path) -> None:
        """By name, or as part of making a file smaller that is small enough already."""
        image = make_file(directory / "image", 10_001)
        volume, content = FileVolume(str(image)), image.read_bytes()
        for give_back in (volume.release_reservation, lambda: volume.shrink_to(10 * MIB)):
            volume.grow_to(20 * MIB)
            volume.make_growth_durable()
            give_back()
            sync(directory)
            assert image.stat().st_blocks * 512 <= 4 * 4096
            assert image.read_bytes() == content

    def test_shrinking(self, directory: Path) -> None:
        image = make_file(directory / "image", 5 * MIB)
        volume = FileVolume(str(image))
        start = image.read_bytes()[:12_345]
        volume.grow_to(20 * MIB)
        volume.shrink_to(12_345)
        assert image.read_bytes() == start
        assert image.stat().st_blocks * 512 < 65536
        volume.shrink_to(6 * MIB)
        assert volume.size == 12_345

    def test_discarding(self, directory: Path) -> None:
        image = make_file(directory / "image", 5 * MIB)
        content = image.read_bytes()
        FileVolume(str(image)).discard(MIB, 3 * MIB)
        assert image.read_bytes() == content[:MIB] + bytes(3 * MIB) + content[4 * MIB :]
        sync(directory)
        assert image.stat().st_blocks * 512 <= 2 * MIB + 65536

    @staticmethod
    def _fill(directory: Path) -> None:
        with (directory / "others").open("wb") as others:
            step, end = 64 * MIB, 0
            while step >= MIB:
                try:
                    os.posix_fallocate(others.fileno(), end, step)
                    end += step
                except OSError:
                    step //= 4


class TestFileElsewhere:
    def test_a_limit(self, tmp_path: Path) -> None:
        volume = open_volume(make_file(tmp_path / "image", 10_001), size_limit=MIB)
        volume.grow_to(MIB)
        with pytest.raises(FileLimitReached) as caught:
            volume.grow_to(MIB + 1)
        assert (caught.value.missing, caught.value.limit) == (1, MIB)
        assert volume.facts().capacity_limit == MIB

    def test_read_only_is_said_before_anything_is_done(self, tmp_path: Path) -> None:
        with mounted_tmpfs(tmp_path, MIB) as mounted:
            volume = FileVolume(str(make_file(mounted / "image", 4096)))
            run("mount", "-o", "remount,ro", mounted)
            volume.facts()
            with pytest.raises(ImageReadOnly):
                volume.grow_to(8192)


class TestBlockDevice:
    @pytest.mark.parametrize("sector_size", [512, 4096])
    def test_its_size_is_fixed(self, tmp_path: Path, sector_size: int) -> None:
        size = 3 * MIB + sector_size
        with loop_device(tmp_path / "backing", size, sector_size=sector_size) as device:
            volume = BlockVolume(str(device))
            assert volume.facts() == VolumeFacts(
                str(device), VolumeKind.BLOCK, size, size, None, sector_size
            )
            volume.grow_to(size)
            volume.make_growth_durable()
            volume.release_reservation()
            with pytest.raises(DeviceTooSmall) as caught:
                volume.grow_to(size + 65536)
            assert (caught.value.missing, caught.value.limit) == (65536, size)
            volume.shrink_to(size)
            with pytest.raises(CannotShrink):
                volume.shrink_to(MIB)

    def test_discarding_frees_whole_sectors(self, tmp_path: Path) -> None:
        backing = tmp_path / "backing"
        with loop_device(backing, 8 * MIB, sector_size=4096) as device:
            with WritablePort(device) as port:
                port.write(0, b"z" * 8 * MIB)
                port.flush()
            used = backing.stat().st_blocks * 512
            BlockVolume(str(device)).discard(MIB - 1, 2 * MIB + 2)
            BlockVolume(str(device)).discard(100, 4000)
            with WritablePort(device) as port:
                assert port.read(0, MIB) == b"z" * MIB
                assert port.read(MIB, 2 * MIB) == bytes(2 * MIB)
                assert port.read(3 * MIB, 5 * MIB) == b"z" * 5 * MIB
        assert used - backing.stat().st_blocks * 512 == 2 * MIB


class TestStorageThatCannot:
    def test_discard(self, tmp_path: Path) -> None:
        with mounted_ramfs(tmp_path) as mounted:
            image = make_file(mounted / "image", MIB)
            with loop_device(mounted / "backing", MIB) as device:
                for path in (image, device):
                    with pytest.raises(DiscardFailed) as caught:
                        open_volume(path).discard(0, MIB)
                    assert caught.value.facts == {
                        "image": str(path),
                        "offset": 0,
                        "length": MIB,
                        "reason": "Operation not supported",
                    }
            assert image.read_bytes() == content_of(MIB)

    def test_reserve(self, file_systems: dict[str, Path]) -> None:
        """Then there is only the file system's word that the space is there."""
        image = make_file(file_systems["ext2"] / "image", 10_001)
        volume = FileVolume(str(image))
        before = image.stat().st_blocks
        volume.grow_to(20 * MIB)
        with pytest.raises(FileSystemFull):
            volume.grow_to(10 << 30)
        assert image.stat().st_blocks == before
        volume.release_reservation()
        image.unlink()

    def test_tell_what_is_reserved(self, tmp_path: Path) -> None:
        with mounted_tmpfs(tmp_path, MIB) as mounted:
            volume = FileVolume(str(make_file(mounted / "image", 4096)))
            volume.grow_to(MIB)
            assert volume.facts().free_bytes == MIB - 4096
            with pytest.raises(FileSystemFull):
                volume.grow_to(MIB + 1)
            assert volume.facts().free_bytes == MIB - 4096


@pytest.fixture(params=["file", "loop device"])
def volume(
    tmp_path: Path, fake_lvm: FakeLvm, request: pytest.FixtureRequest
) -> Iterator[LvmVolume]:
    """A volume of 3 extents in a group of 10; another one has 2 of them."""
    with ExitStack() as stack:
        device = stack.enter_context(loop_device(tmp_path / "pv", MIB))
        fake_lvm.add_group("vg-1", 10, [device], EXTENT)
        path = make_file(tmp_path / "lv", 3 * EXTENT)
        if request.param == "loop device":
            path = stack.enter_context(loop_device(path, 3 * EXTENT))
        fake_lvm.add_volume("vg-1", "base", path)
        fake_lvm.add_volume("vg-1", "other", make_file(tmp_path / "other", 2 * EXTENT))
        yield open_lvm_volume(path)


class TestLogicalVolume:
    def test_what_it_is(self, volume: LvmVolume) -> None:
        assert volume.facts() == VolumeFacts(
            volume.path,
            VolumeKind.LVM,
            3 * EXTENT,
            8 * EXTENT,
            None,
            EXTENT,
            volume.facts().pool,
            unit_cost=EXTENT,
        )
        assert volume.facts().pool.startswith("volume group ")

    def test_growing(self, volume: LvmVolume, fake_lvm: FakeLvm) -> None:
        required = 4 * EXTENT + 1
        after = volume.facts().growth(required).size_after
        volume.grow_to(required)
        volume.make_growth_durable()
        assert volume.size == after == 5 * EXTENT
        assert fake_lvm.calls("lvextend") == [["-L", f"{5 * EXTENT}b", "--", "vg-1/base"]]
        with WritablePort(volume.path) as port:
            assert port.read(0, 3 * EXTENT) == content_of(3 * EXTENT)
            port.write(5 * EXTENT - 1, b"z")

    def test_large_enough_already(self, volume: LvmVolume, fake_lvm: FakeLvm) -> None:
        volume.grow_to(3 * EXTENT)
        volume.shrink_to(2 * EXTENT + 1)
        assert fake_lvm.calls("lvextend") == fake_lvm.calls("lvreduce") == []

    def test_up_to_the_last_extent(self, volume: LvmVolume) -> None:
        with pytest.raises(VolumeGroupFull) as caught:
            volume.grow_to(8 * EXTENT + 1)
        assert (caught.value.missing, caught.value.limit) == (1, 8 * EXTENT)
        assert volume.size == 3 * EXTENT
        volume.grow_to(8 * EXTENT)
        assert volume.size == 8 * EXTENT == volume.facts().capacity_limit

    def test_shrinking(self, volume: LvmVolume, fake_lvm: FakeLvm) -> None:
        assert volume.size_after_shrinking(EXTENT + 1) == 2 * EXTENT
        volume.shrink_to(EXTENT + 1)
        assert volume.size == 2 * EXTENT
        assert fake_lvm.calls("lvreduce") == [["-f", "-L", f"{2 * EXTENT}b", "--", "vg-1/base"]]
        assert volume.facts().capacity_limit == 8 * EXTENT

    def test_discarding(self, volume: LvmVolume) -> None:
        volume.discard(EXTENT, EXTENT)
        content = content_of(3 * EXTENT)
        with WritablePort(volume.path) as port:
            expected = content[:EXTENT] + bytes(EXTENT) + content[2 * EXTENT :]
            assert port.read(0, 3 * EXTENT) == expected

    def test_growth_that_failed(self, volume: LvmVolume, fake_lvm: FakeLvm) -> None:
        fake_lvm.break_command("lvextend", 5, "Can't get lock for vg-1.")
        with pytest.raises(ExtensionRefused) as caught:
            volume.grow_to(4 * EXTENT)
        assert caught.value.facts == {
            "image": volume.path,
            "size": 4 * EXTENT,
            "status": 5,
            "reason": "Can't get lock for vg-1.",
        }
        assert volume.size == 3 * EXTENT

    def test_growth_that_only_claims_to_have_worked(
        self, volume: LvmVolume, fake_lvm: FakeLvm
    ) -> None:
        fake_lvm.break_command("lvextend", 0, "done, honestly")
        with pytest.raises(LvmFailed, match="not as large as requested"):
            volume.grow_to(4 * EXTENT)

    def test_a_device_that_has_not_the_size_of_its_volume(self, volume: LvmVolume) -> None:
        path = Path(volume.path)
        if path.is_block_device():
            os.truncate(path_of_backing_file(path), 2 * EXTENT)
            run("losetup", "--set-capacity", path)
        else:
            os.truncate(path, 2 * EXTENT)
        with pytest.raises(NotALogicalVolume, match="12582912 bytes, but it has 8388608"):
            volume.grow_to(4 * EXTENT)


# A type, its stripes, and how many of them hold data of their own: as lvs 2.03.16 reports them.
LAYOUTS = [
    *(("striped", stripes, stripes) for stripes in range(1, 5)),
    ("linear", 1, 1), ("cache", 1, 1), ("mirror", 2, 1), ("raid0", 3, 3), ("raid1", 3, 1),
    ("raid4", 3, 2), ("raid5_ls", 4, 3), ("raid6_zr", 5, 3), ("raid10", 4, 2),
]  # fmt: skip


class TestLvmGroups:
    @settings(max_examples=10)
    @given(
        extents=st.integers(2, 8),
        layout=st.sampled_from(LAYOUTS),
        required=st.integers(0, 40 * 4096),
    )
    def test_growth_is_predicted_to_the_byte(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        extents: int,
        layout: tuple[str, int, int],
        required: int,
    ) -> None:
        segment_type, stripes, with_data = layout
        scratch = tmp_path_factory.mktemp("lvm")
        with pytest.MonkeyPatch.context() as monkeypatch:
            fake = FakeLvm(scratch)
            fake.install(monkeypatch)
            fake.add_group("vg", 40, [], 4096)
            path = make_file(scratch / "lv", extents * with_data * 4096)
            segments = 2 if segment_type == "striped" else 1
            fake.add_volume("vg", "lv", path, segment_type, stripes, segments)
            volume = open_lvm_volume(path)
            facts = volume.facts()
            expected = facts.growth(required)
            assert facts.capacity_limit is not None
            if expected.missing:
                assert expected.size_after > facts.capacity_limit
                with pytest.raises(VolumeGroupFull):
                    volume.grow_to(required)
            else:
                volume.grow_to(required)
                assert volume.size == expected.size_after

    @pytest.mark.parametrize("segment_type", ["writecache", "vdo", "snapshot", "unknown"])
    def test_other_types_are_not_extended(
        self, tmp_path: Path, fake_lvm: FakeLvm, segment_type: str
    ) -> None:
        fake_lvm.add_group("vg", 10, [], EXTENT)
        path = make_file(tmp_path / "lv", EXTENT)
        fake_lvm.add_volume("vg", "lv", path, segment_type)
        volume = open_lvm_volume(path)
        assert volume.facts().capacity_limit == EXTENT
        with pytest.raises(VolumeNotExtensible, match=segment_type) as caught:
            volume.grow_to(EXTENT + 1)
        assert caught.value.missing == 1
        assert fake_lvm.calls("lvextend") == []

    def test_copies_and_parity_take_space_too(self, tmp_path: Path, fake_lvm: FakeLvm) -> None:
        """Of 10 extents 2 are taken by each of two mirrored volumes of one."""
        fake_lvm.add_group("vg", 10, [], EXTENT)
        volumes = []
        for name in ("one", "two"):
            path = make_file(tmp_path / name, EXTENT)
            fake_lvm.add_volume("vg", name, path, "raid1", 2)
            volumes.append(open_lvm_volume(path))
        first, second = (volume.facts() for volume in volumes)
        assert first.capacity_limit == 4 * EXTENT
        (claim,) = first.claim(3 * EXTENT).items()
        assert claim[1] == 4 * EXTENT
        beside = second.beside(dict([claim]))
        assert beside.refusal(4 * EXTENT) is not None

    def test_every_physical_volume_is_flushed(self, tmp_path: Path, fake_lvm: FakeLvm) -> None:
        """One of two devices has data in its cache that cannot be written: that must come out."""
        with (
            loop_device(tmp_path / "sound", MIB) as sound,
            device_that_loses_writes(tmp_path, size=4 * MIB, kept=MIB) as losing,
        ):
            fake_lvm.add_group("vg", 10, [sound, losing], EXTENT)
            fake_lvm.add_group("unrelated", 10, [tmp_path / "none"], EXTENT)
            path = make_file(tmp_path / "lv", EXTENT)
            fake_lvm.add_volume("vg", "lv", path)
            volume = open_lvm_volume(path)
            volume.make_growth_durable()
            with WritablePort(losing) as port:
                port.write(0, b"x" * 4 * MIB)
                with pytest.raises(FlushFailed) as caught:
                    volume.make_growth_durable()
            assert caught.value.image == str(losing)

    def test_lvm_does_not_know_it(self, tmp_path: Path, fake_lvm: FakeLvm) -> None:
        fake_lvm.add_group("vg", 10, [], EXTENT)
        with pytest.raises(NotALogicalVolume, match="Invalid path for Logical Volume"):
            open_lvm_volume(make_file(tmp_path / "file", 100))
        with pytest.raises(ImageMissing):
            open_lvm_volume(tmp_path / "none")

    def test_no_lvm_at_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(LvmMissing):
            open_lvm_volume(make_file(tmp_path / "file", 100))
