# SPDX-License-Identifier: Apache-2.0
"""Programs that read qcow2 and share no code with QEMU, nor with us.

What a reader cannot do is here too, in two kinds: what it refuses, and what it reads wrongly
without a word, also from images that QEMU alone has written.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pyqcow
from dissect.hypervisor.disk.qcow2 import QCow2
from msgspec import Struct

from tests.support import qemu

if TYPE_CHECKING:
    from typing import Any


class Feature(StrEnum):
    """What not every reader can read."""

    BACKING_FILE = "a backing file"
    COMPRESSED = "compressed clusters"
    EXTENDED_L2 = "subclusters"
    HIDING_ZEROES = "zeros that hide data of a backing file"
    RAW_BACKING_FILE = "a raw backing file"
    VERSION_2_BACKING_FILE = "a backing file of version 2"
    ZSTD = "zstd"


class Refused(Exception):
    """The reader said that it cannot read this image, and why."""


class Reader(Struct, frozen=True):
    """A program, and what it cannot read.

    Attributes:
        read: The guest's disk; raises :class:`Refused`.
        refuses: Features that it says it cannot read, with words of its message.
        misreads: Features that it reads wrongly, or for ever.
    """

    name: str
    read: Callable[[Path], bytes]
    refuses: Mapping[Feature, str]
    misreads: frozenset[Feature] = frozenset()


def features_of(image: Path) -> frozenset[Feature]:
    """What a reader of an image meets, in itself and below, as QEMU says."""
    found: set[Feature] = set()
    for each in qemu.info_of_chain(image):
        if each["format"] == "raw":
            found.add(Feature.RAW_BACKING_FILE)
            continue
        path, details = Path(each["filename"]), each["format-specific"]["data"]
        if "backing-filename" in each:
            found.add(Feature.BACKING_FILE)
            if details["compat"] == "0.10":
                found.add(Feature.VERSION_2_BACKING_FILE)
            if any(run["depth"] == 0 and run["zero"] for run in qemu.mapping(path)):
                found.add(Feature.HIDING_ZEROES)
        if details.get("extended-l2"):
            found.add(Feature.EXTENDED_L2)
        if details.get("compression-type") == "zstd":
            found.add(Feature.ZSTD)
        if qemu.check(path).get("compressed-clusters"):
            found.add(Feature.COMPRESSED)
    return frozenset(found)


def assert_readers_agree(image: Path, expected: bytes) -> None:
    """QEMU shows *expected*, and so does every reader that can read such an image."""
    assert qemu.content(image) == expected
    features = features_of(image)
    for reader in READERS:
        if unreadable := features & set(reader.refuses):
            assert refusal(reader, image) in {reader.refuses[each] for each in unreadable}
        elif not features & reader.misreads:
            assert reader.read(image) == expected, reader.name


def refusal(reader: Reader, image: Path) -> str:
    """Which of the messages that go with its refusals a reader gives, or all that it says."""
    try:
        reader.read(image)
    except Refused as refused:
        said = str(refused)
        return next((each for each in reader.refuses.values() if each in said), said)
    raise AssertionError(f"{reader.name} reads {image}")


def dissect_bitmap_count(image: Path) -> int:
    """How many persistent bitmaps the image says it has, as dissect.hypervisor reads it."""
    with image.open("rb") as file:
        extension = QCow2(file, allow_no_backing_file=True).bitmap_header
        return 0 if extension is None else int(extension.nb_bitmaps)


def qcowinfo(image: Path) -> dict[str, str]:
    """What ``qcowinfo`` prints of an image, by its labels; raises :class:`Refused`."""
    result = qemu.run("qcowinfo", image, expect=(0, 1))
    if result.returncode:
        raise Refused(result.stderr)
    rows = (line.partition(":") for line in result.stdout.splitlines())
    return {label.strip(): value.strip() for label, _, value in rows if value}


def _read_with_dissect(image: Path) -> bytes:
    disk = QCow2(image)
    with closing(disk.fh):
        return bytes(disk.open().read())


def _read_with_libqcow(image: Path) -> bytes:
    try:
        with ExitStack() as opened:
            disk = _open_with_libqcow(image, opened)
            return b"".join(iter(lambda: disk.read_buffer(1 << 20), b""))
    except OSError as error:
        raise Refused(str(error)) from error


def _open_with_libqcow(image: Path, opened: ExitStack) -> Any:
    disk = pyqcow.file()
    disk.open(str(image))
    opened.callback(disk.close)
    if backing := disk.get_backing_filename():
        disk.set_parent(_open_with_libqcow(image.parent / backing, opened))
    return disk


def _read_with_7zip(image: Path) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        # It reads no devices, and names what it extracts after the image.
        archive = Path(scratch) / "disk.qcow2"
        shutil.copyfile(image, archive)
        result = qemu.run("7zz", "e", "-y", f"-o{scratch}", archive, expect=(0, 2))
        if result.returncode:
            raise Refused(result.stdout + result.stderr)
        return (Path(scratch) / "disk.img").read_bytes()


DISSECT: Final = Reader(
    "dissect.hypervisor",
    _read_with_dissect,
    refuses={},
    # Release 3.21 takes an L2 entry for its bitmap, and loops; what follows the short header of
    # version 2, names among it, it takes for features.
    misreads=frozenset({Feature.EXTENDED_L2, Feature.VERSION_2_BACKING_FILE}),
)
LIBQCOW: Final = Reader(
    "libqcow",
    _read_with_libqcow,
    refuses={
        Feature.EXTENDED_L2: "unsupported incompatible features flags: 0x00000010",
        Feature.RAW_BACKING_FILE: "unsupported file signature",
        Feature.ZSTD: "unsupported incompatible features flags: 0x00000008",
    },
    misreads=frozenset({Feature.COMPRESSED, Feature.HIDING_ZEROES}),
)
SEVEN_ZIP: Final = Reader(
    "7-Zip",
    _read_with_7zip,
    refuses={
        Feature.BACKING_FILE: "Unsupported method",
        Feature.EXTENDED_L2: "Unsupported method",
        Feature.ZSTD: "Unsupported method",
    },
)
READERS: Final = (DISSECT, LIBQCOW, SEVEN_ZIP)
