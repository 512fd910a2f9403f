# SPDX-License-Identifier: Apache-2.0
"""Trees of images, of which one branch is merged, pruned or repaired. The others notice nothing.

Whatever an image shows, and whichever checkpoints it has by the chain test, it shows and has
afterwards: no less, which costs a full backup, and no more, which costs data.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from hypothesis import event, example, given, settings
from hypothesis import strategies as st

import chainmerge
from chainmerge.errors import Refused
from chainmerge.options import Access, MergeOptions
from tests.chain.unchanged import state
from tests.conftest import SOAK
from tests.merging.test_faults import Checkpoints, chain_of, checkpoints_of, covers
from tests.support.images import MIB
from tests.support.qemu import content, create, qemu_img, qemu_io
from tests.support.surgery import mark_bitmap_in_use

if TYPE_CHECKING:
    from collections.abc import Collection

NAMES = ("monday", "sunday")
State = Literal["absent", "valid", "disabled", "in use"]


@dataclass(frozen=True)
class Image:
    """What an image is like; *below* is the number of the one that it stands on."""

    below: int
    bitmaps: tuple[State, State]
    writes: bool


@dataclass(frozen=True)
class Case:
    """A tree, the range of it that is merged or pruned, or of which base is repaired, and how."""

    images: tuple[Image, ...]
    base: int
    top: int
    command: MergeOptions | str


PRUNE_BASE: Final = "prune base"
PRUNE_CHAIN: Final = "prune the chain"
REPAIR: Final = "repair base"

STATES: st.SearchStrategy[State] = st.sampled_from(
    ("valid", "valid", "absent", "absent", "disabled", "in use")
)
MERGES = st.builds(
    MergeOptions,
    engine=st.sampled_from(("native", "native", "native", "qemu")),
    direction=st.sampled_from(("auto", "commit", "commit", "pull")),
    delete=st.booleans(),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = draw(st.integers(3, 6))
    below = [-1] + [draw(st.integers(max(0, number - 2), number - 1)) for number in range(1, count)]
    images = tuple(
        Image(one, draw(st.tuples(STATES, STATES)), draw(st.booleans())) for one in below
    )
    top = draw(st.integers(1, count - 1))
    line = [below[top]]
    while below[line[-1]] >= 0:
        line.append(below[line[-1]])
    others = [PRUNE_BASE, REPAIR] if top in below else [PRUNE_BASE, REPAIR, PRUNE_CHAIN]
    command = draw(MERGES | MERGES | st.sampled_from(others))
    return Case(images, draw(st.sampled_from(line)), top, command)


def build(directory: Path, images: tuple[Image, ...]) -> list[Path]:
    paths: list[Path] = []
    for number, image in enumerate(images):
        below = paths[image.below].name if number else None
        path = create(directory / f"{number}.qcow2", MIB, backing=below)
        for name, bitmap in zip(NAMES, image.bitmaps, strict=True):
            if bitmap != "absent":
                qemu_img("bitmap", "--add", path, name)
        if image.writes:
            qemu_io(path, f"write -P {number + 1} {number * 128}k 64k")
        for name, bitmap in zip(NAMES, image.bitmaps, strict=True):
            if bitmap == "disabled":
                qemu_img("bitmap", "--disable", path, name)
        for name, bitmap in zip(NAMES, image.bitmaps, strict=True):
            if bitmap == "in use":
                mark_bitmap_in_use(path, name)
        paths.append(path)
    return paths


def views(paths: Collection[Path]) -> dict[Path, tuple[bytes, Checkpoints]]:
    """What an image shows, and the bits of its checkpoints."""
    return {path: (content(path), checkpoints_of(path)) for path in paths}


def run(command: MergeOptions | str, top: Path, base: Path) -> str:
    """What came of it."""
    if isinstance(command, MergeOptions):
        return chainmerge.merge(top, base, options=command).outcome
    if command == REPAIR:
        return f"{command}: {bool(chainmerge.repair(base).actions)}"
    active = str(top) if command == PRUNE_CHAIN else None
    report = chainmerge.prune(top, base, Access(active=active))
    return f"{command}: {bool(report.removed)}"


def tree(*bitmaps: tuple[int, str]) -> tuple[Image, ...]:
    """Empty images, by the image below and the initials of its valid bitmaps."""
    states: dict[bool, State] = {True: "valid", False: "absent"}
    return tuple(
        Image(below, (states["m" in names], states["s" in names]), writes=False)
        for below, names in bitmaps
    )


@settings(max_examples=1000 if SOAK else 20)
@given(cases())
@example(Case(tree((-1, "m"), (0, "m"), (1, "m"), (1, "")), 0, 3, PRUNE_BASE))
@example(Case(tree((-1, ""), (0, ""), (0, "m"), (1, "m")), 0, 2, MergeOptions()))
def test_the_other_images_notice_nothing(case: Case) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        paths = build(Path(scratch), case.images)
        base, top = paths[case.base], paths[case.top]
        merged = chain_of(top)
        merged = merged[: merged.index(base) + 1]
        before = views(paths)
        for _ in range(2):
            untouched = state(Path(scratch))
            try:
                event(run(case.command, top, base))
            except Refused as refusal:
                event(refusal.code)
                assert state(Path(scratch)) == untouched
            after = views([path for path in paths if path.exists()])
            assert before.keys() - after.keys() <= set(merged)
            others = after.keys() - set(merged[1:])
            for path in others:
                assert after[path][0] == before[path][0]
                found, wanted = after[path][1], before[path][1]
                assert found.keys() == wanted.keys(), path
                assert all(covers(found[name], wanted[name]) for name in wanted), path
            if not isinstance(case.command, MergeOptions):
                assert all(after[path][1].keys() <= before[path][1].keys() for path in after)
