# SPDX-License-Identifier: Apache-2.0
"""Scanning ten thousand images: the first time, and again when nothing has changed."""

from __future__ import annotations

import shutil
from functools import partial
from typing import TYPE_CHECKING, Final

from benchmarks.harness import CHAINMERGE, Comparison, Contender, Limit, run_rounds
from benchmarks.images import MIB
from tests.support.qemu import create, qemu_io

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from benchmarks.harness import Settings

_CHAINS: Final = 3000
_CHAINS_IN_A_DIRECTORY: Final = 100
_DISK: Final = 64 * MIB
_FIRST: Final = "the first scan"


def scan_of_ten_thousand_images(settings: Settings) -> Iterable[Comparison]:
    """3,000 chains of three or four images each; the peer is the first scan of them."""
    images, states = settings.scratch / "images", settings.scratch / "state"
    settings.note("building images")
    count = _build(images, settings.scratch)
    outcomes = run_rounds(
        settings,
        (
            Contender(
                _FIRST,
                (_scan(images, states / "first"),),
                prepare=partial(shutil.rmtree, states / "first", ignore_errors=True),
            ),
            # The round that does not count is the one that it remembers.
            Contender("again", (_scan(images, states / "again"),)),
        ),
        load_programs=None,
    )
    yield Comparison(
        f"scan of {count:,} unchanged images in {_CHAINS:,} chains",
        outcomes["again"],
        _FIRST,
        outcomes[_FIRST],
        limit=Limit(memory=200 * MIB),
    )


def _scan(images: Path, state: Path) -> tuple[str, ...]:
    return ("env", f"XDG_STATE_HOME={state}", *CHAINMERGE, "scan", "-q", str(images))


def _build(images: Path, scratch: Path) -> int:
    """Copies of one small chain, each in a directory of its own; how many images they are."""
    templates: list[Path] = []
    for number in range(4):
        template = scratch / f"disk{number}.qcow2"
        if templates:
            create(template, backing=templates[-1].name, cluster_size=16384)
        else:
            create(template, _DISK, cluster_size=16384)
        qemu_io(template, "write -q -P 1 0 32k", "write -q -P 2 8M 32k")
        templates.append(template)
    count = 0
    for chain in range(_CHAINS):
        home = images / f"{chain // _CHAINS_IN_A_DIRECTORY}" / f"vm{chain}"
        home.mkdir(parents=True)
        for template in templates[: 4 if chain % 3 == 0 else 3]:
            shutil.copyfile(template, home / template.name)
            count += 1
    return count
