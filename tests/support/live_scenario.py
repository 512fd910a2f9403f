# SPDX-License-Identifier: Apache-2.0
"""A chain for live merges with stale, kept and new checkpoints, and what must come of it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import chainmerge
from chainmerge import live
from chainmerge.options import LiveOptions
from chainmerge.qcow2.bitmaps import read_bits, read_directory
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.storage.files import FileReadable
from tests.support.live_vm import running_vm
from tests.support.qemu import assert_clean, content, create, info, qemu_io

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chainmerge.qcow2.bits import BitSet
    from tests.support.live_vm import Guest

MIB = 1 << 20
DISK = 48 * MIB
# Finer than a cluster, so that bits for what was merely copied would show.
CLUSTER = 64 << 10
COARSE, FINE = 16 << 10, 4 << 10


@dataclass(frozen=True)
class LiveScenario:
    """A chain, root first: base, the images above it, and perhaps an active one on top.

    ``everywhere`` is a checkpoint that all images carry, ``in_top`` one (of a finer granularity)
    that only the uppermost merged image and those above it carry.
    """

    images: tuple[Path, ...]
    base: Path
    top: Path
    before: bytes
    everywhere: frozenset[int]
    in_top: frozenset[int]

    @property
    def is_active(self) -> bool:
        """Whether top is what the guest writes to."""
        return self.top == self.images[-1]

    @property
    def result(self) -> Path:
        """The image that is active after the merge."""
        return self.base if self.is_active else self.images[-1]

    @property
    def merged(self) -> tuple[Path, ...]:
        """The images that are gone from the chain afterwards."""
        start, end = self.images.index(self.base), self.images.index(self.top)
        return self.images[start + 1 : end + 1]


def build(directory: Path, seed: int, *, levels: int, active: bool, stale: int = 3) -> LiveScenario:
    """Create a chain with *levels* images to be merged; *active* means the uppermost one is."""
    random_ = random.Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    base = create(directory / "base.qcow2", DISK)
    chainmerge.bitmaps_add(base, "everywhere", granularity=COARSE)
    everywhere: set[int] = set()
    in_top: set[int] = set()
    write_randomly(base, random_, [(everywhere, COARSE)])
    for number in range(stale):
        chainmerge.bitmaps_add(base, f"stale-{number}", granularity=COARSE)
    images = [base]
    count = levels + (not active)
    for level in range(count):
        image = create(directory / f"{level}.qcow2", backing=images[-1].name)
        images.append(image)
        chainmerge.bitmaps_add(image, "everywhere", granularity=COARSE)
        if level >= levels - 1:
            chainmerge.bitmaps_add(image, "in-top", granularity=FINE)
        if level < levels:
            marked = [(everywhere, COARSE), *([(in_top, FINE)] if level == levels - 1 else [])]
            write_randomly(image, random_, marked)
    return LiveScenario(
        images=tuple(images),
        base=base,
        top=images[levels],
        before=content(images[-1]),
        everywhere=frozenset(everywhere),
        in_top=frozenset(in_top),
    )


def write_randomly(
    image: Path, random_: random.Random, marked: Sequence[tuple[set[int], int]]
) -> None:
    """Write here and there.

    Args:
        image: to what.
        random_: what, and where.
        marked: sets that get the numbers of the granules, each with their size in bytes.
    """
    commands = []
    for _ in range(12):
        length = random_.randrange(1, 2 * MIB // 512) * 512
        offset = random_.randrange(0, (DISK - length) // 512) * 512
        commands.append(f"write -q -P {random_.randrange(1, 256)} {offset} {length}")
        for bits, unit in marked:
            bits |= set(range(offset // unit, -(-(offset + length) // unit)))
    qemu_io(image, *commands)


def granules(bits: BitSet) -> set[int]:
    """The numbers of the dirty granules."""
    return {
        granule
        for start, length in zip(*bits.ranges(), strict=True)
        for granule in range(
            int(start) // bits.granularity,
            -(-int(start + length) // bits.granularity),
        )
    }


def stored_bits(image: Path, passed_over: Sequence[str] = ()) -> dict[str, set[int]]:
    """The bits of all valid bitmaps of a closed image; a broken one fails the test."""
    with FileReadable(image) as readable:
        parsed = Qcow2Image(readable)
        entries = [entry for entry in read_directory(parsed) if entry.name not in passed_over]
        assert parsed.header.bitmaps_trusted or not entries
        assert all(entry.auto and not entry.in_use for entry in entries), entries
        return {entry.name: granules(read_bits(parsed, entry)) for entry in entries}


def assert_closed_right(scenario: LiveScenario, guest: Guest) -> None:
    """The VM has ended in order: content, chain and bitmaps are right to the bit."""
    assert_closed_content(scenario, guest)
    assert stored_bits(scenario.base) == expected_bits(scenario, guest)


def assert_closed_safe(scenario: LiveScenario, guest: Guest) -> None:
    """The same; but base's bitmaps may have recorded the copy, in whole clusters."""
    assert_closed_content(scenario, guest)
    assert_same_clusters(stored_bits(scenario.base), expected_bits(scenario, guest))


def assert_same_bits(found: dict[str, set[int]], expected: dict[str, set[int]]) -> None:
    """To the bit."""
    assert found == expected


def assert_same_clusters(found: dict[str, set[int]], expected: dict[str, set[int]]) -> None:
    """Every bit is there, and no other cluster is dirty."""
    assert found.keys() == expected.keys()
    for name, granularity in (("everywhere", COARSE), ("in-top", FINE)):
        assert expected[name] <= found[name]
        a_cluster = CLUSTER // granularity
        touched = {bit // a_cluster for bit in expected[name]}
        assert {bit // a_cluster for bit in found[name]} == touched


def assert_closed_content(scenario: LiveScenario, guest: Guest) -> None:
    """The VM has ended in order: content and chain are right, and what stands on base."""
    result = scenario.result
    assert content(result) == guest.applied_to(scenario.before)
    backing = info(result).get("full-backing-filename")
    assert backing == (None if scenario.is_active else str(scenario.base))
    assert_clean(scenario.base)
    if not scenario.is_active:
        above = stored_bits(result)
        assert above == {"everywhere": guest.dirty(COARSE), "in-top": guest.dirty(FINE)}


def expected_bits(scenario: LiveScenario, guest: Guest) -> dict[str, set[int]]:
    """The granules that base's bitmaps have to have."""
    everywhere, in_top = set(scenario.everywhere), set(scenario.in_top)
    if scenario.is_active:
        everywhere |= guest.dirty(COARSE)
        in_top |= guest.dirty(FINE)
    return {"everywhere": everywhere, "in-top": in_top}


def leftovers(scenario: LiveScenario) -> list[str]:
    """The small files of unfinished merges that lie beside the images."""
    return leftovers_in(scenario.base.parent)


def leftovers_in(directory: Path) -> list[str]:
    """The small files of unfinished merges in a directory."""
    return sorted(
        file.name
        for file in directory.iterdir()
        if file.name.endswith(("chainmerge-live", "chainmerge-saved", "chainmerge-journal"))
    )


def merge_into_raw_base(
    directory: Path, is_active: bool, command_line: Callable[[Sequence[Path]], list[str]]
) -> list[Path]:
    """Merge an overlay into a raw image while a guest writes, and look at what came of it.

    Returns the images, root first, of which the overlay, at 1, is deleted.
    """
    base = create(directory / "base.raw", DISK, fmt="raw")
    qemu_io(base, "write -q -P 1 0 8M", fmt="raw")
    top = create(directory / "top.qcow2", backing=base, backing_format="raw")
    qemu_io(top, "write -q -P 2 4M 8M")
    images = [base, top]
    if not is_active:
        images.append(create(directory / "leaf.qcow2", backing=top))
    before = content(images[-1])
    with running_vm(directory / "vm", images, command_line) as vm:
        with vm.guest(1, DISK) as guest, vm.disk() as disk:
            live.merge(disk, top, options=LiveOptions(delete=True))
        vm.quit()
    result, fmt = (base, "raw") if is_active else (images[-1], "qcow2")
    assert content(result, fmt) == guest.applied_to(before)
    assert not top.exists()
    return images
