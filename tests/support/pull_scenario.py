# SPDX-License-Identifier: Apache-2.0
"""A chain for pulls in a running VM, with checkpoints of all kinds, and what must come of it."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import chainmerge
from chainmerge.bitmaps.rules import BitmapState
from tests.support.live_scenario import COARSE, DISK, FINE, stored_bits, write_randomly
from tests.support.live_vm import granules_of
from tests.support.qemu import assert_clean, content, create, info

if TYPE_CHECKING:
    from tests.support.live_vm import Guest


GRANULARITIES: Final = {"everywhere": COARSE, "from-base": COARSE, "in-top": FINE}
"""Of the checkpoints that are kept, in bytes."""


@dataclass(frozen=True)
class PullScenario:
    """A chain, root first: what top stands on afterwards, what is pulled up, top, what is above.

    ``everywhere`` is a checkpoint that all images carry, ``from_base`` one that those from base up
    carry, ``in_top`` one (of a finer granularity) of top and above alone; each with the granules
    that top has of it before the guest writes. Top also carries ``gap``, which base has and an
    image between lacks, if there is one.
    """

    images: tuple[Path, ...]
    base: Path
    top: Path
    onto: Path | None
    before: bytes
    expected: dict[str, frozenset[int]]
    has_gap: bool
    digests: dict[Path, str]

    @property
    def is_active(self) -> bool:
        """Whether top is what the guest writes to."""
        return self.top == self.images[-1]

    @property
    def pulled(self) -> tuple[Path, ...]:
        """The images that the chain does without afterwards, lowest first."""
        return self.images[self.images.index(self.base) : self.images.index(self.top)]

    @property
    def chain_after(self) -> list[str]:
        """The names of the disk's images afterwards, the active one first."""
        left = [path.name for path in self.images if path not in self.pulled]
        return left[::-1]


def build_pull(
    directory: Path, seed: int, *, levels: int, active: bool, onto: bool = True
) -> PullScenario:
    """Create a chain of which *levels* images go up into top.

    Args:
        directory: where.
        seed: of what is written, and where.
        levels: how many images are pulled.
        active: whether top is the active image; else there is one above.
        onto: whether there is an image below base, that top stands on afterwards.
    """
    random_ = random.Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    names = [*(["root"] if onto else []), *(f"p{n}" for n in range(levels)), "top"]
    names += [] if active else ["above"]
    first, last = int(onto), int(onto) + levels
    bits: dict[str, set[int]] = {"everywhere": set(), "from-base": set(), "in-top": set()}
    images: list[Path] = []
    for index, name in enumerate(names):
        image = create(
            directory / f"{name}.qcow2", DISK, backing=images[-1].name if images else None
        )
        images.append(image)
        has = ["everywhere"]
        has += ["from-base"] if index >= first else []
        has += ["in-top"] if index >= last else []
        has += ["gap"] if levels > 1 and (index == first or index >= last) else []
        for one in has:
            granularity = FINE if one == "in-top" else COARSE
            chainmerge.bitmaps_add(image, one, granularity=granularity)
        if index == first:
            chainmerge.bitmaps_add(image, "of-base-alone", granularity=COARSE)
        if index <= last:
            # What the image below has of it is not top's to have.
            kept = [one for one in has if one in bits and index >= first]
            write_randomly(
                image, random_, [(bits[k], FINE if k == "in-top" else COARSE) for k in kept]
            )
    pulled = images[first:last]
    return PullScenario(
        images=tuple(images),
        base=images[first],
        top=images[last],
        onto=images[0] if onto else None,
        before=content(images[-1]),
        expected={name: frozenset(granules) for name, granules in bits.items()},
        has_gap=levels > 1,
        digests={one: digest_of(one) for one in (*images[:first], *pulled)},
    )


def digest_of(image: Path) -> str:
    """Of all bytes of a file."""
    return hashlib.sha256(image.read_bytes()).hexdigest()


def assert_pulled_right(scenario: PullScenario, guest: Guest, *, deleted: bool) -> None:
    """The VM has ended in order: content, chain and bitmaps are right to the bit."""
    leaf = scenario.images[-1]
    assert content(leaf) == guest.applied_to(scenario.before)
    assert_clean(scenario.top)
    backing = info(scenario.top)
    if scenario.onto is None:
        assert "backing-filename" not in backing
    else:
        # As it was written: counted from top's directory, and the format named.
        assert backing["backing-filename"] == scenario.onto.name
        assert backing["backing-filename-format"] == "qcow2"
    for image, digest in scenario.digests.items():
        if deleted and image in scenario.pulled:
            assert not image.exists()
        else:
            assert digest_of(image) == digest
    assert_bits_right(scenario, guest)


def assert_bits_right(scenario: PullScenario, guest: Guest) -> None:
    """Top's bitmaps are what they have to be, and those above too."""
    found = bits_of_top(scenario)
    expected = {name: set(granules) for name, granules in scenario.expected.items()}
    if scenario.is_active:
        for name, granularity in GRANULARITIES.items():
            expected[name] |= guest.dirty(granularity)
    else:
        above = stored_bits(scenario.images[-1])
        wanted = {name: guest.dirty(granularity) for name, granularity in GRANULARITIES.items()}
        assert {name: above[name] for name in GRANULARITIES} == wanted
    assert found == expected


def assert_valid_ones_right(scenario: PullScenario, guest: Guest) -> None:
    """Whichever of top's bitmaps are valid, none lacks a write; the last one may be in or not."""
    broken = [
        one.name
        for one in chainmerge.bitmaps_list(scenario.top).rows
        if one.image == str(scenario.top) and one.state != BitmapState.VALID
    ]
    found = stored_bits(scenario.top, passed_over=broken)
    guest_at_most = [*guest.journal, *([guest.under_way] if guest.under_way else [])]
    for name, bits in found.items():
        granularity = GRANULARITIES[name]
        least = scenario.expected[name] | guest.dirty(granularity)
        assert least <= bits <= least | granules_of(guest_at_most, granularity)


def bits_of_top(scenario: PullScenario) -> dict[str, set[int]]:
    """The bits of top's valid bitmaps; what is not valid has to be a tombstone that is needed."""
    needed = ["gap"] if scenario.has_gap and not scenario.is_active else []
    listed = chainmerge.bitmaps_list(scenario.top).rows
    assert [
        one.name for one in listed if one.tombstone and one.image == str(scenario.top)
    ] == needed
    return stored_bits(scenario.top, passed_over=needed)
