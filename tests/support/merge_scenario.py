# SPDX-License-Identifier: Apache-2.0
"""A chain with everything that a merge has to get right, built once and copied for each test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from msgspec import Struct
from msgspec.structs import replace

from chainmerge.options import EngineChoice
from tests.support.qemu import content, create, dirty_ranges, qemu_img, qemu_io

MIB = 1 << 20
GUEST_SIZE = 256 * MIB
GRANULARITY = 65536

# Where the guest wrote, in MiB, (start, length), while each image was the active one.
BASE_WRITES = ((0, 4), (40, 2), (100, 8))
TOP_WRITES = ((2, 6), (60, 24), (103, 1), (200, 8))

VALID_IN_BOTH = ("cp-1", "cp-2")
VALID_IN_TOP = ("cp-3",)
STALE = ("old-1", "old-2", "old-3")


class Scenario(Struct, frozen=True):
    """Paths of a chain ``base <- top <- leaf`` and what must hold after the merge."""

    directory: Path
    expected_content: bytes
    expected_bits: dict[str, set[int]]
    engine: EngineChoice = "auto"

    @property
    def base(self) -> Path:
        return self.directory / "base.qcow2"

    @property
    def top(self) -> Path:
        return self.directory / "top.qcow2"

    def copy_to(self, directory: Path) -> Scenario:
        shutil.copytree(self.directory, directory)
        return replace(self, directory=directory)

    def assert_merged(self) -> None:
        """Content and bits of base are right, judged by QEMU."""
        assert content(self.base) == self.expected_content
        for name, bits in self.expected_bits.items():
            assert dirty_granules(self.base, name) == bits, name


def granules(writes: tuple[tuple[int, int], ...]) -> set[int]:
    """The bits that writes (in MiB) set at 64 KiB granularity."""
    per_mib = MIB // GRANULARITY
    return {
        bit
        for start, length in writes
        for bit in range(start * per_mib, (start + length) * per_mib)
    }


def dirty_granules(image: Path, name: str) -> set[int]:
    """The dirty bits of a bitmap of 64 KiB granularity, as QEMU reads it."""
    return {
        bit
        for run in dirty_ranges(image, name)
        for bit in range(run.start // GRANULARITY, (run.start + run.length) // GRANULARITY)
    }


def build(directory: Path) -> Scenario:
    """Build the chain; takes about a second."""
    directory.mkdir()
    base, top = directory / "base.qcow2", directory / "top.qcow2"
    create(base, GUEST_SIZE)
    for name in (*VALID_IN_BOTH, *STALE):
        qemu_img("bitmap", "--add", base, name)
    qemu_io(base, *(f"write -P {start % 200 + 1} {start}M {n}M" for start, n in BASE_WRITES))
    create(top, backing="base.qcow2")
    for name in (*VALID_IN_BOTH, *VALID_IN_TOP):
        qemu_img("bitmap", "--add", top, name)
    qemu_io(
        top,
        *(f"write -P {start % 200 + 55} {start}M {n}M" for start, n in TOP_WRITES),
        "write -z 41M 1M",
    )
    zeroed = granules(((41, 1),))
    both = granules(BASE_WRITES) | granules(TOP_WRITES) | zeroed
    bits = dict.fromkeys(VALID_IN_BOTH, both)
    bits |= dict.fromkeys(VALID_IN_TOP, granules(TOP_WRITES) | zeroed)
    return Scenario(directory, content(top), bits)


@pytest.fixture(scope="session")
def scenario_template(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    return build(tmp_path_factory.mktemp("scenario") / "chain")


@pytest.fixture
def scenario(scenario_template: Scenario, tmp_path: Path) -> Scenario:
    return scenario_template.copy_to(tmp_path / "chain")
