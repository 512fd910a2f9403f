# SPDX-License-Identifier: Apache-2.0
"""Random chains with bitmaps, and a merge in each: what to build (strategies), and building it."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hypothesis import strategies as st
from msgspec import Struct

from chainmerge.options import EngineChoice, MergeOptions
from tests.support import qemu
from tests.support.images import (
    KIB,
    MIB,
    SECTOR,
    Discard,
    Geometry,
    ImagePlan,
    Operation,
    WriteCompressed,
    apply_writes,
    geometries,
    operations,
)
from tests.support.surgery import clear_autoclear_features, mark_bitmap_in_use

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# With clusters of 512 bytes an L2 table maps 32 KiB, with 4 KiB it is 2 MiB.
MAX_DISK: Final = 3 * MIB
NAMES: Final = ("monday", "-t, 'ue\"sday", "wednesd\u00e4y", "t" * 300)
GRANULARITIES: Final = (512, 1 * KIB, 4 * KIB, 64 * KIB, 1 * MIB, 2 << 30)


class State(StrEnum):
    """What becomes of a bitmap in one image."""

    VALID = "valid"
    DISABLED = "disabled"  # before the image is written to
    DISABLED_AFTERWARDS = "disabled afterwards"
    IN_USE = "in-use"


class BitmapPlan(Struct, frozen=True):
    """A bitmap of one image; a *late* one does not see the first part of the writes."""

    name: str
    granularity: int
    state: State
    late: bool


class LayerPlan(Struct, frozen=True):
    """One image of the chain, written to in two parts, with what happens between them.

    *untrusted*: in the end a program that does not know bitmaps has been there. *missing*: so
    many bytes a raw file is short of whole sectors.
    """

    image: ImagePlan
    first_part: int
    snapshot: bool
    bitmaps: tuple[BitmapPlan, ...]
    untrusted: bool
    missing: int

    @property
    def disk_size(self) -> int:
        return self.image.disk_size

    @property
    def geometry(self) -> Geometry | None:
        return self.image.geometry

    @property
    def holds_bitmaps(self) -> bool:
        return _holds_bitmaps(self.geometry)

    @property
    def format(self) -> str:
        return "raw" if self.geometry is None else "qcow2"

    def seen_by(self, bitmap: BitmapPlan) -> Sequence[Operation]:
        """The writes that QEMU records in one of the bitmaps."""
        if bitmap.state is State.DISABLED:
            return ()
        return self.image.operations[self.first_part if bitmap.late else 0 :]


class MergeCase(Struct, frozen=True):
    """A chain, what stands on top besides it, and the merge that is asked for."""

    layers: tuple[LayerPlan, ...]
    branch: LayerPlan | None
    base: int
    top: int
    options: MergeOptions
    on_device: bool
    twice: bool

    @property
    def pulls(self) -> bool:
        """Whether top is what is written."""
        return self.options.direction == "pull"

    @property
    def result(self) -> LayerPlan:
        """The image that is written."""
        return self.layers[self.top if self.pulls else self.base]

    @property
    def above(self) -> tuple[LayerPlan, ...]:
        """Every image that stands on top."""
        branch = () if self.branch is None else (self.branch,)
        return (*self.layers[self.top + 1 :], *branch)

    @property
    def children(self) -> tuple[LayerPlan, ...]:
        """The images directly on top."""
        branch = () if self.branch is None else (self.branch,)
        return (*self.layers[self.top + 1 : self.top + 2], *branch)


def _holds_bitmaps(geometry: Geometry | None) -> bool:
    return geometry is not None and geometry.compat != "0.10"


def _can_hold_snapshots(geometry: Geometry | None) -> bool:
    """Whether refcounts are wide enough, where compressed clusters share a host cluster."""
    return geometry is not None and geometry.refcount_bits >= 16


@st.composite
def merge_cases(
    draw: st.DrawFn, engine: EngineChoice, devices: st.SearchStrategy[bool] | None = None
) -> MergeCase:
    """A chain of two to five images and a merge in it that QEMU's tools would also do.

    *devices* says whether what is written lies on a block device, a third of the cases if None.
    """
    count = draw(st.integers(2, 5))
    top = count - 1 if draw(st.booleans()) else draw(st.integers(1, count - 1))
    base = top - 1 if draw(st.booleans()) else draw(st.integers(0, top - 1))
    images = draw(_images(count))
    bitmaps = draw(_bitmaps([_holds_bitmaps(image.geometry) for image in images]))
    layers = tuple(draw(_layers(image, own)) for image, own in zip(images, bitmaps, strict=True))
    branch = draw(_layers(draw(_images(1, on_top=True))[0], ())) if _one_in(draw, 5) else None
    pulls = engine == "native" and _one_in(draw, 3)
    in_place = engine == "qemu" or (layers[base].geometry is None and not pulls)
    in_place = in_place or draw(st.booleans())
    options = MergeOptions(
        delete=_one_in(draw, 3),
        keep_name=_one_in(draw, 3),
        drop_bitmaps=_one_in(draw, 3),
        drop_snapshots=_one_in(draw, 2),
        engine=engine,
        direction="pull" if pulls else "commit",
        data="in-place" if in_place else "cow",
        detect_zeroes=engine == "native" and _one_in(draw, 4),
    )
    return MergeCase(
        layers,
        branch,
        base,
        top,
        options,
        on_device=not options.keep_name and (draw(devices) if devices else _one_in(draw, 3)),
        twice=_one_in(draw, 4),
    )


def _one_in(draw: st.DrawFn, number: int) -> bool:
    # What is drawn shrinks to 0, so to the plain case.
    return draw(st.integers(0, number - 1)) == number - 1


@st.composite
def _images(draw: st.DrawFn, count: int, *, on_top: bool = False) -> list[ImagePlan]:
    """Images from the root up: any geometries, mostly the same size, the root sometimes raw."""
    disk_size = draw(st.integers(1, MAX_DISK // SECTOR)) * SECTOR
    images = []
    for index in range(count):
        if _one_in(draw, 3):
            disk_size = draw(st.integers(1, MAX_DISK // SECTOR)) * SECTOR
        raw = index == 0 and not on_top and _one_in(draw, 6)
        geometry = draw(geometries()) if not raw else None
        written = draw(operations(geometry or Geometry(), disk_size, max_size=6))
        if raw:
            written = [each for each in written if not isinstance(each, WriteCompressed)]
        images.append(ImagePlan(geometry, disk_size, tuple(written)))
    return images


@st.composite
def _bitmaps(draw: st.DrawFn, holds: Sequence[bool]) -> list[tuple[BitmapPlan, ...]]:
    """Checkpoints: valid from the active image down to some other, except where something went
    wrong in one or two images."""
    found: list[list[BitmapPlan]] = [[] for _ in holds]
    for name in NAMES[: draw(st.integers(0, len(NAMES)))]:
        oldest = draw(st.integers(0, len(holds) - 1))
        states: list[State | None] = [
            State.VALID if index >= oldest else None for index in range(len(holds))
        ]
        for _ in range(draw(st.sampled_from((0, 0, 1, 2)))):
            states[draw(st.integers(0, len(holds) - 1))] = draw(st.sampled_from((*State, None)))
        granularity = draw(st.sampled_from(GRANULARITIES))
        for index, state in enumerate(states):
            if _one_in(draw, 4):
                granularity = draw(st.sampled_from(GRANULARITIES))
            if state is not None and holds[index]:
                late = index == oldest and draw(st.booleans())
                found[index].append(BitmapPlan(name, granularity, state, late))
    return [tuple(each) for each in found]


@st.composite
def _layers(draw: st.DrawFn, image: ImagePlan, bitmaps: tuple[BitmapPlan, ...]) -> LayerPlan:
    return LayerPlan(
        image,
        first_part=draw(st.integers(0, len(image.operations))),
        snapshot=_can_hold_snapshots(image.geometry) and _one_in(draw, 6),
        bitmaps=bitmaps,
        untrusted=bool(bitmaps) and _one_in(draw, 12),
        missing=0 if image.geometry else draw(st.sampled_from((0, 0, 12, SECTOR - 1))),
    )


class BuiltCase(Struct, frozen=True):
    """The images of a :class:`MergeCase` on disk."""

    case: MergeCase
    directory: Path
    paths: tuple[Path, ...]
    branch: Path | None

    @property
    def base(self) -> Path:
        return self.paths[self.case.base]

    @property
    def top(self) -> Path:
        return self.paths[self.case.top]

    @property
    def written(self) -> Path:
        """The image that is written, under the name that it has before the merge."""
        return self.top if self.case.pulls else self.base

    @property
    def above(self) -> tuple[Path, ...]:
        """Every image that stands on top, in the order of :attr:`MergeCase.above`."""
        branch = () if self.branch is None else (self.branch,)
        return (*self.paths[self.case.top + 1 :], *branch)

    @property
    def below(self) -> tuple[Path, ...]:
        return self.paths[: self.case.base]


def build(directory: Path, case: MergeCase) -> BuiltCase:
    """Create and fill all images, each while it is the active one."""
    paths: list[Path] = []
    for index, layer in enumerate(case.layers):
        path = directory / f"{index}.{layer.format}"
        below = (paths[-1], case.layers[index - 1].format) if paths else None
        paths.append(_build_layer(path, layer, below))
    branch = None
    if case.branch is not None:
        below = (paths[case.top], case.layers[case.top].format)
        branch = _build_layer(directory / "branch.qcow2", case.branch, below)
    for pattern in directory.glob("pattern-*"):
        pattern.unlink()
    return BuiltCase(case, directory, tuple(paths), branch)


def _build_layer(path: Path, layer: LayerPlan, below: tuple[Path, str] | None) -> Path:
    qemu.create(
        path,
        layer.disk_size,
        backing=None if below is None else below[0].name,
        backing_format="" if below is None else below[1],
        fmt=layer.format,
        **({} if layer.geometry is None else layer.geometry.options),
    )
    _add_bitmaps(path, (bitmap for bitmap in layer.bitmaps if not bitmap.late))
    _write(path, layer, layer.image.operations[: layer.first_part])
    if layer.snapshot:
        qemu.qemu_img("snapshot", "-c", "before", path)
    _add_bitmaps(path, (bitmap for bitmap in layer.bitmaps if bitmap.late))
    _write(path, layer, layer.image.operations[layer.first_part :])
    for bitmap in layer.bitmaps:
        if bitmap.state is State.DISABLED_AFTERWARDS:
            qemu.qemu_img("bitmap", "--disable", "--", path, bitmap.name)
    for bitmap in layer.bitmaps:
        if bitmap.state is State.IN_USE:
            mark_bitmap_in_use(path, bitmap.name)
    if layer.untrusted:
        clear_autoclear_features(path)
    if layer.missing:
        os.truncate(path, layer.disk_size - layer.missing)
    return path


def _add_bitmaps(path: Path, bitmaps: Iterable[BitmapPlan]) -> None:
    for bitmap in bitmaps:
        disabled = ("--disable",) if bitmap.state is State.DISABLED else ()
        granularity = ("-g", str(bitmap.granularity))
        qemu.qemu_img("bitmap", "--add", *disabled, *granularity, "--", path, bitmap.name)


def _write(path: Path, layer: LayerPlan, written: Sequence[Operation]) -> None:
    # Without this option QEMU ignores discards, and does not record them either.
    discards = any(isinstance(each, Discard) for each in written)
    options = ("--discard", "unmap") if discards else ()
    apply_writes(path, written, fmt=layer.format, options=options)
