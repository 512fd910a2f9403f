# SPDX-License-Identifier: Apache-2.0
"""What we have written is read by programs that share no code with QEMU, and they agree with it."""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING, Any, Final

import pytest
from msgspec import Struct

import chainmerge
from chainmerge.options import Access, EngineChoice, MergeOptions
from tests.support import qemu
from tests.support.images import KIB, MIB
from tests.support.loopdev import loop_device
from tests.support.readers import (
    DISSECT,
    READERS,
    Feature,
    Reader,
    assert_readers_agree,
    dissect_bitmap_count,
    features_of,
    qcowinfo,
    refusal,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

DISK: Final = 8 * MIB
CHECKPOINT: Final = "monday"


class Layout(Struct, frozen=True):
    """How the images of a chain are made: options of qcow2, and what is written to them."""

    options: dict[str, Any]
    compressed: bool = False
    zeroes: bool = True
    bitmaps: bool = True


LAYOUTS: Final = {
    "64 KiB": Layout({}),
    "no zeros": Layout({}, zeroes=False),
    "4 KiB": Layout({"cluster_size": 4096}),
    "version 2": Layout({"compat": "0.10"}, bitmaps=False),
    "compressed": Layout({}, compressed=True),
    "zstd": Layout({"compression_type": "zstd"}, compressed=True),
    "subclusters": Layout({"extended_l2": "on"}),
}


class Operation(Struct, frozen=True):
    """A merge of one image of a chain into another, and the image that it is written to."""

    base: int
    top: int
    options: MergeOptions

    @property
    def written(self) -> int:
        return self.top if self.options.direction == "pull" else self.base


# On a chain of three: 0 <- 1 <- 2.
OPERATIONS: Final = {
    "native": Operation(0, 2, MergeOptions(engine="native")),
    "native, bitmaps and metadata verified": Operation(
        0, 2, MergeOptions(engine="native", verify="metadata")
    ),
    "native, in place": Operation(0, 2, MergeOptions(engine="native", data="in-place")),
    "qemu": Operation(0, 2, MergeOptions(engine="qemu")),
    "qemu, bitmaps and metadata verified": Operation(
        0, 2, MergeOptions(engine="qemu", verify="metadata")
    ),
    "below another": Operation(0, 1, MergeOptions(engine="native")),
    "below another, by qemu": Operation(0, 1, MergeOptions(engine="qemu")),
    "pull": Operation(1, 2, MergeOptions(engine="native", direction="pull")),
    "flatten": Operation(0, 2, MergeOptions(engine="native", direction="pull")),
}


def make_chain(directory: Path, layout: Layout, count: int, disk: int = DISK) -> list[Path]:
    """Images with data, zeros over data, zeros over nothing, and holes, each in its own way."""
    images: list[Path] = []
    for number in range(count):
        image = directory / f"{number}.qcow2"
        if images:
            qemu.create(image, disk, backing=images[-1].name, **layout.options)
        else:
            qemu.create(image, disk, **layout.options)
        if layout.bitmaps:
            qemu.qemu_img("bitmap", "--add", image, CHECKPOINT)
        fill(image, number, layout)
        images.append(image)
    return images


def fill(image: Path, number: int, layout: Layout) -> None:
    seed, shift = number % 250 + 1, number % 6 * 256 * KIB
    packed = (f"write -c -P {seed} {6 * MIB} 256k",)
    data = (
        f"write -P {seed} {shift} 1M",
        f"write -P {seed + 1} {3 * MIB + shift // 2 + 3 * KIB} 5k",
    )
    zeroes = (
        f"write -z {shift + 320 * KIB} 192k",
        f"write -z -u {4 * MIB + shift} 128k",
        f"write -z {shift + 900 * KIB + 512} 3k",
    )
    qemu.qemu_io(image, *packed * layout.compressed, *data, *zeroes * layout.zeroes)


def run(images: list[Path], operation: Operation) -> None:
    report = chainmerge.merge(
        images[operation.top], base=images[operation.base], options=operation.options
    )
    assert report.outcome == "merged"


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_what_a_merge_wrote(tmp_path: Path, layout: Layout, name: str) -> None:
    operation = OPERATIONS[name]
    images = make_chain(tmp_path, layout, 3)
    shown = [qemu.content(image) for image in images]
    run(images, operation)
    written = images[operation.written]
    assert_readers_agree(written, shown[operation.top])
    for above in range(operation.top + 1, len(images)):
        assert_readers_agree(images[above], shown[above])
    qemu.assert_clean(written)
    assert list(qemu.bitmap_names(written)) == [CHECKPOINT] * layout.bitmaps
    if layout.bitmaps:
        assert dissect_bitmap_count(written) == 1


@pytest.mark.parametrize("engine", ["native", "qemu"])
@pytest.mark.parametrize("layout", ["64 KiB", "no zeros"])
def test_a_long_chain(tmp_path: Path, layout: str, engine: EngineChoice) -> None:
    images = make_chain(tmp_path, LAYOUTS[layout], 24)
    shown = [qemu.content(image) for image in images]
    run(images, Operation(4, 18, MergeOptions(engine=engine)))
    assert_readers_agree(images[4], shown[18])
    assert_readers_agree(images[-1], shown[-1])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_disk_that_grows_on_a_device(tmp_path: Path, layout: Layout) -> None:
    """Data goes in place, and the disk gets larger."""
    (image,) = make_chain(tmp_path, layout, 1)
    with loop_device(tmp_path / "behind", 32 * MIB) as device:
        device.write_bytes(b"\xaa" * (32 * MIB))
        with device.open("r+b") as file:
            file.write(image.read_bytes())
        top = qemu.create(tmp_path / "top.qcow2", 2 * DISK, backing=device, **layout.options)
        if layout.bitmaps:
            qemu.qemu_img("bitmap", "--add", top, CHECKPOINT)
        fill(top, 1, layout)
        qemu.qemu_io(top, f"write -P 9 {DISK + MIB} 300k")
        shown = qemu.content(top)
        chainmerge.merge(
            top,
            options=MergeOptions(engine="native", data="in-place"),
            access=Access(allow_backing=("/dev",), search=(str(tmp_path),)),
        )
        assert_readers_agree(device, shown)


@pytest.mark.parametrize("engine", ["native", "qemu"])
def test_an_image_above_a_raw_one(tmp_path: Path, engine: EngineChoice) -> None:
    raw = qemu.create(tmp_path / "0.raw", DISK, fmt="raw")
    qemu.qemu_io(raw, f"write -P 7 {MIB} 5M", fmt="raw")
    images = [raw]
    for number in range(1, 4):
        fmt = images[-1].suffix[1:]
        image = tmp_path / f"{number}.qcow2"
        images.append(qemu.create(image, backing=images[-1].name, backing_format=fmt))
        fill(image, number, LAYOUTS["64 KiB"])
    shown = [qemu.content(image) for image in images[1:]]
    run(images, Operation(1, 2, MergeOptions(engine=engine)))
    assert_readers_agree(images[1], shown[1])
    assert_readers_agree(images[3], shown[2])
    run(images, Operation(0, 1, MergeOptions(engine=engine)))
    assert raw.read_bytes() == shown[1]
    assert_readers_agree(images[3], shown[2])


@pytest.mark.parametrize("name", ["native", "qemu", "flatten"])
@pytest.mark.parametrize("layout", ["64 KiB", "4 KiB", "version 2"])
def test_size_and_backing_file_are_what_an_old_reader_finds(
    tmp_path: Path, layout: str, name: str
) -> None:
    images = make_chain(tmp_path, LAYOUTS[layout], 4)
    operation = OPERATIONS[name]
    run(images, operation)
    found = qcowinfo(images[operation.written])
    assert f"({DISK} bytes)" in found["Media size"]
    assert "Backing filename" not in found
    assert qcowinfo(images[3])["Backing filename"] == images[operation.written].name


# Whether what readers are said not to read is so


def of_qemu_alone(directory: Path, feature: Feature) -> Path:
    if feature is Feature.RAW_BACKING_FILE:
        raw = qemu.create(directory / "0.raw", DISK, fmt="raw")
        return qemu.create(directory / "1.qcow2", backing=raw.name, backing_format="raw")
    layout = {
        Feature.BACKING_FILE: "64 KiB",
        Feature.COMPRESSED: "compressed",
        Feature.EXTENDED_L2: "subclusters",
        Feature.HIDING_ZEROES: "64 KiB",
        Feature.VERSION_2_BACKING_FILE: "version 2",
        Feature.ZSTD: "zstd",
    }[feature]
    stands_alone = {Feature.COMPRESSED, Feature.EXTENDED_L2, Feature.ZSTD}
    count = 1 if feature in stands_alone else 2
    return make_chain(directory, LAYOUTS[layout], count)[-1]


def gaps(of: Callable[[Reader], Iterable[Feature]]) -> list[Any]:
    return [
        pytest.param(reader, feature, id=f"{reader.name}: {feature}")
        for reader in READERS
        for feature in sorted(of(reader))
    ]


@pytest.mark.parametrize(("reader", "feature"), gaps(lambda reader: reader.refuses))
def test_a_reader_says_what_it_does_not_read(
    tmp_path: Path, reader: Reader, feature: Feature
) -> None:
    image = of_qemu_alone(tmp_path, feature)
    assert feature in features_of(image)
    assert refusal(reader, image) == reader.refuses[feature]


@pytest.mark.parametrize(("reader", "feature"), gaps(lambda reader: reader.misreads))
def test_a_reader_misreads_what_qemu_alone_has_written(
    tmp_path: Path, reader: Reader, feature: Feature
) -> None:
    """If this fails it has learnt to: take the feature off its list."""
    image = of_qemu_alone(tmp_path, feature)
    assert feature in features_of(image)
    assert not reads_in_time(reader, image, qemu.content(image))


def reads_in_time(reader: Reader, image: Path, expected: bytes) -> bool:
    """Whether a child with little time and memory reads what it should."""
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (3, 3))
            resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
            os._exit(0 if reader.read(image) == expected else 1)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


# Whether the tests above can fail


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_another_byte_is_noticed(tmp_path: Path, reader: Reader) -> None:
    (image,) = make_chain(tmp_path, LAYOUTS["64 KiB"], 1)
    expected = qemu.content(image)
    assert reads_in_time(reader, image, expected)
    qemu.qemu_io(image, "write -P 77 100k 512")
    assert not reads_in_time(reader, image, expected)
    assert reader is not DISSECT or dissect_bitmap_count(image) == 1
