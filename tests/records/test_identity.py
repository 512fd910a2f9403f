# SPDX-License-Identifier: Apache-2.0
"""What tells an image from one that comes to stand under its name, on real file systems."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from chainmerge.records import identity as identities
from chainmerge.records.changes import called, moved
from chainmerge.records.disks import DiskEntry, read_entry
from chainmerge.records.files import STATE_DIRECTORY, write_state
from chainmerge.records.identity import BlockDevices, ImageIdentity, Sameness, compare, identify
from chainmerge.records.merge_journal import (
    JOURNAL_VERSION,
    Asked,
    Journal,
    JournalledImage,
    JournalledRepoint,
    read_journal,
)
from chainmerge.records.merged_record import (
    DoomedImage,
    LeftInPlace,
    MergedRecord,
    Pulled,
    Superseded,
    read_merged_record,
)
from chainmerge.records.request import RecordedRequest
from chainmerge.records.unfinished import status
from tests.support.loopdev import loop_device, mounted_file_system, mounted_ramfs
from tests.support.reused import made_again

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20
# Those of the first two lines keep no time of birth.
FILE_SYSTEMS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "ext4 with small inodes": ("ext4", 64 * MIB, ("-I", "128")),
    "ext3": ("ext3", 64 * MIB, ("-I", "128")),
    "ext4": ("ext4", 64 * MIB, ()),
    "xfs": ("xfs", 300 * MIB, ()),
    "btrfs": ("btrfs", 128 * MIB, ()),
}


@pytest.fixture(params=FILE_SYSTEMS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    kind, size, options = FILE_SYSTEMS[request.param]
    if shutil.which(f"mkfs.{kind}") is None:
        pytest.skip(f"there is no mkfs.{kind}")
    with mounted_file_system(tmp_path, kind, size, *options) as mounted:
        yield mounted


def test_a_reused_inode_is_another_image(place: Path) -> None:
    file = place / "image"
    file.write_bytes(b"first")
    before = identify(file)
    assert compare(before, identify(file)) is Sameness.SAME
    renamed = file.rename(place / "renamed")
    renamed.write_bytes(b"written to, which makes it none other")
    assert compare(before, identify(renamed)) is Sameness.SAME
    renamed.unlink()
    made_again(file, before.number)
    assert compare(before, identify(file)) is Sameness.OTHER


def test_nothing_is_known_without_evidence(tmp_path: Path) -> None:
    with mounted_ramfs(tmp_path) as place:
        file = place / "image"
        file.write_bytes(b"")
        before = identify(file)
        assert (before.birth, before.handle) == ("", "")
        assert compare(before, identify(file)) is Sameness.UNKNOWN


def file_identity(number: int = 1, birth: str = "", handle: str = "") -> ImageIdentity:
    return ImageIdentity("/image", "file", number, birth, handle)


@pytest.mark.parametrize(
    ("one", "other", "answer"),
    [
        (file_identity(), file_identity(number=2), Sameness.OTHER),
        (file_identity(), file_identity(), Sameness.UNKNOWN),
        (file_identity(birth="1.0"), file_identity(birth="1.0"), Sameness.SAME),
        (file_identity(birth="1.0"), file_identity(birth="2.0"), Sameness.OTHER),
        # One from a document of before, which has no handle.
        (file_identity(birth="1.0"), file_identity(birth="1.0", handle="a:1"), Sameness.SAME),
        (file_identity(), file_identity(handle="a:1"), Sameness.UNKNOWN),
        # Born in the same instant of a coarse clock.
        (
            file_identity(birth="1.0", handle="a:1"),
            file_identity(birth="1.0", handle="a:2"),
            Sameness.OTHER,
        ),
        # One seen by the server, and one by its client.
        (file_identity(handle="a:1"), file_identity(handle="b:2"), Sameness.UNKNOWN),
        (
            file_identity(birth="1.0", handle="a:1"),
            file_identity(birth="1.0", handle="b:2"),
            Sameness.SAME,
        ),
    ],
)
def test_files(one: ImageIdentity, other: ImageIdentity, answer: Sameness) -> None:
    assert compare(one, other) is answer
    assert compare(other, one) is answer


def test_files_and_devices_are_never_the_same() -> None:
    device = ImageIdentity("/image", "block", 1, "LVM-1")
    assert compare(file_identity(), device) is Sameness.OTHER


def block_identity(
    number: int = 0, birth: str = "", handle: str = "", boot: str = ""
) -> ImageIdentity:
    return ImageIdentity("/dev/dm-3", "block", number, birth, handle, boot)


@pytest.mark.parametrize(
    ("one", "other", "answer"),
    [
        (block_identity(birth="LVM-1"), block_identity(birth="LVM-1"), Sameness.SAME),
        (block_identity(birth="LVM-1"), block_identity(birth="LVM-2"), Sameness.OTHER),
        (block_identity(3, boot="x"), block_identity(birth="LVM-1"), Sameness.UNKNOWN),
        # Without an identity the number counts, in the same run of the machine.
        (block_identity(3, "", "7", "x"), block_identity(3, "", "7", "x"), Sameness.SAME),
        (block_identity(3, "", "7", "x"), block_identity(3, "", "8", "x"), Sameness.UNKNOWN),
        (block_identity(3, "", "7", "x"), block_identity(4, "", "8", "x"), Sameness.OTHER),
        (block_identity(3, "", "7", "x"), block_identity(3, "", "7", "y"), Sameness.UNKNOWN),
        (block_identity(3), block_identity(3), Sameness.UNKNOWN),
        # From documents of before: the name of a file says nothing of the file.
        (block_identity(birth="loop-aa"), block_identity(birth="loop-aa"), Sameness.UNKNOWN),
    ],
)
def test_devices(one: ImageIdentity, other: ImageIdentity, answer: Sameness) -> None:
    assert compare(one, other) is answer
    assert compare(other, one) is answer


def test_a_loop_device_is_the_file_below_it(tmp_path: Path) -> None:
    volume, other = tmp_path / "volume", tmp_path / "other"
    with loop_device(volume, MIB) as device:
        before = identify(device)
    with loop_device(other, MIB) as taken, loop_device(volume, MIB) as device:
        assert compare(identify(device), before) is Sameness.SAME
        assert compare(identify(taken), before) is Sameness.OTHER
    with loop_device(volume, MIB - 4096, "--offset", "4096") as device:
        assert compare(identify(device), before) is Sameness.OTHER
    volume.unlink()
    with loop_device(volume, MIB) as device:
        assert compare(identify(device), before) is Sameness.OTHER


def test_a_device_that_has_another_number_is_called_what_it_is_called_now(tmp_path: Path) -> None:
    volume, other = tmp_path / "volume", tmp_path / "other"
    with loop_device(volume, MIB) as device:
        before = identify(device)
    assert moved([before], BlockDevices()) == {}
    # The number goes to the next one that asks.
    with loop_device(other, MIB), loop_device(volume, MIB) as device:
        moves = moved([before, identify(volume)], BlockDevices())
        assert moves == ({} if str(device) == before.path else {before.path: str(device)})
        assert called(before, moves) == identify(device)


def test_documents_call_a_device_that_has_another_number_what_it_is_called_now(
    tmp_path: Path,
) -> None:
    volume, other = tmp_path / "volume", tmp_path / "other"
    with loop_device(volume, MIB) as device:
        before = identify(device)
    with loop_device(other, MIB), loop_device(volume, MIB) as device:
        now = identify(device)
        assert now.path != before.path
        assert _read_again(tmp_path, read_merged_record, _record(before)) == _record(now)
        assert _read_again(tmp_path, read_journal, _journal(before)) == _journal(now)
        # What somebody typed stays as it was.
        assert _read_again(tmp_path, read_entry, _entry(before)) == msgspec.structs.replace(
            _entry(before), base=now.path, identity=now
        )


def test_devices_are_looked_at_once_however_many_records_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loop_device(tmp_path / "volume", MIB) as device:
        before = identify(device)
    for number in range(40):
        gone = msgspec.structs.replace(before, birth=f"{before.birth}{number}")
        write_state(STATE_DIRECTORY / f"gone-{number}.chainmerge-merged", _record(gone))
    looks = []
    look = identities._nodes_by_identity

    def counted() -> dict[str, str]:
        looks.append(look())
        return looks[-1]

    monkeypatch.setattr(identities, "_nodes_by_identity", counted)
    # The number that the records name is another one's.
    with loop_device(tmp_path / "other", MIB) as other:
        assert status([tmp_path]).merges == ()
        assert looks == [look()]
        assert str(other) in looks[0].values()


def _read_again(
    place: Path, read: Callable[[Path, BlockDevices], object], document: msgspec.Struct
) -> object:
    write_state(place / "document", document)
    return read(place / "document", BlockDevices())


def _request() -> RecordedRequest:
    return RecordedRequest(["/dev/mapper/vg-top"], ["/dev/mapper/vg-base"], {}, {})


def _record(image: ImageIdentity) -> MergedRecord:
    path, doomed = image.path, DoomedImage(image.path, image)
    return MergedRecord(
        top=path,
        base=path,
        result=path,
        result_format="qcow2",
        result_identity=image,
        keep_name=False,
        delete=[doomed],
        pulled=Pulled("its name in the header", image, None, image),
        superseded=Superseded([doomed], ""),
        request=_request(),
        left=LeftInPlace(image, "", ""),
    )


def _journal(image: ImageIdentity) -> Journal:
    return Journal(
        version=JOURNAL_VERSION,
        engine="native",
        base=image,
        overlays=[JournalledImage(image, "")],
        children=[image],
        asked=Asked(delete=True, keep_name=False, shrink=False, discard=False),
        repoint=[JournalledRepoint(image.path, "its name in the header", "qcow2")],
        delete=[image.path],
        rename=[image.path, "/a/file"],
        spent=["a bitmap"],
        boot="",
        request=_request(),
    )


def _entry(image: ImageIdentity) -> DiskEntry:
    return DiskEntry(base=image.path, top=image.path, disks=[image.path], identity=image)


def test_a_loop_device_whose_file_was_deleted_is_known_in_this_boot_only(tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    with loop_device(volume, MIB) as device:
        volume.unlink()
        volume.write_bytes(b"another one has its name")
        now = identify(device)
        assert now.birth == ""
        assert compare(now, identify(device)) is Sameness.SAME
        later = msgspec.structs.replace(now, boot="another")
        assert compare(now, later) is Sameness.UNKNOWN


def test_the_number_that_a_device_has_matters_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identities, "device_identity", lambda _device: "LVM-1")
    device = next(Path("/dev").glob("loop[0-9]*"), None)
    if device is None:
        pytest.skip("there are no loop devices")
    assert (identify(device).number, identify(device).birth) == (0, "LVM-1")
