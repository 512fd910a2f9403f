# SPDX-License-Identifier: Apache-2.0
"""The map of a disk as characters: who is uppermost where, and what the characters mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from chainmerge.documents.disk_map import DiskMap, MapColumn
from chainmerge.documents.plan import PlannedImage, Role
from chainmerge.report import layout
from chainmerge.report.map_strip import strip_of_chain, strip_of_plan
from chainmerge.report.plain import plain_text
from tests.support import reports
from tests.support.cli import chainmerge
from tests.support.images import MIB
from tests.support.qemu import create, qemu_io

if TYPE_CHECKING:
    from pathlib import Path


def disk_map(layers: str, paths: tuple[str, ...]) -> DiskMap:
    """A digit a column: the layer that decides it, or a dot for none."""
    columns = tuple(
        MapColumn(None if one == "." else int(one), 0 if one == "." else 1, 1, 0) for one in layers
    )
    return DiskMap(len(columns), 1, paths, columns)


@pytest.mark.parametrize(
    ("layers", "images", "shown"),
    [
        ("0012.", 3, "Map  ░░▒█·\n     █ this image  ▒ between  ░ root  · zeros\n"),
        ("01", 2, "Map  ░█\n     █ this image  ░ root\n"),
        ("0.", 1, "Map  █·\n     █ this image  · zeros\n"),
        ("03", 4, "Map  ░█\n     █ this image  ▒ between  ░ root\n"),
        ("", 1, ""),
    ],
)
def test_a_chain(layers: str, images: int, shown: str) -> None:
    drawn = disk_map(layers, tuple(f"/{index}" for index in range(images)))
    assert plain_text(layout.pairs(strip_of_chain(drawn))) == shown


def test_a_plan() -> None:
    roles = (Role.BELOW, Role.BASE, Role.MIDDLE, Role.TOP, Role.ABOVE)
    some = reports.plan().images[0]
    images: tuple[PlannedImage, ...] = tuple(
        replace(some, path=f"/{index}", role=role) for index, role in enumerate(roles)
    )
    drawn = disk_map("01234.", tuple(f"/{index}" for index in range(5)))
    assert plain_text(
        layout.pairs(strip_of_plan(drawn, replace(reports.plan(), images=images)))
    ) == ("Map  ░▒██▓·\n     ▓ above  █ merged  ▒ base  ░ below  · zeros\n")


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    images = [create(tmp_path / "base.qcow2", 64 * MIB)]
    images += [create(tmp_path / "top.qcow2", backing=images[0])]
    qemu_io(images[0], "write -q -P 1 0 32M")
    qemu_io(images[1], "write -q -P 2 16M 8M")
    return images


MAP = f"{'▒' * 12}{'█' * 6}{'▒' * 6}{'·' * 24}"


def test_commands_show_it(chain: list[Path]) -> None:
    for arguments in (["plan"], ["plan", "-v"], ["merge", "-n"]):
        assert MAP in chainmerge(*arguments, chain[1]).out
    assert MAP.replace("▒", "░") in chainmerge("info", chain[1]).out


def test_a_terminal_without_unicode_shows_it_too(chain: list[Path]) -> None:
    ran = chainmerge("plan", chain[1], PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert f"{'=' * 12}{'#' * 6}{'=' * 6}{'.' * 24}" in ran.out


def test_a_chain_that_cannot_be_read_to_its_end_has_a_plan_all_the_same(
    chain: list[Path],
) -> None:
    """The tables are damaged of an image above, which a merge does not read."""
    above = create(chain[0].parent / "above.qcow2", backing=chain[1])
    qemu_io(above, "write -q -P 3 0 1M")
    data = bytearray(above.read_bytes())
    l1 = int.from_bytes(data[40:48])
    data[l1 : l1 + 8] = (0x8000_0000_0000_0001).to_bytes(8)
    above.write_bytes(data)
    ran = chainmerge("plan", chain[1])
    assert ran.status == 0, ran
    assert "Map" not in ran.out
    assert "Do it: " in ran.out
