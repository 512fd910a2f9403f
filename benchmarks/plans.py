# SPDX-License-Identifier: Apache-2.0
"""Planning on metadata of a size that nobody wants to read twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from benchmarks.harness import Comparison, Contender, Limit, run_rounds
from benchmarks.images import MIB, TIB, let_stand_on, program_loader
from benchmarks.metadata_images import write_allocated_image
from tests.support.qemu import create

if TYPE_CHECKING:
    from collections.abc import Iterable

    from benchmarks.harness import Settings

_PEER: Final = "qemu-img measure"
_MEMORY_LIMIT: Final = 600 * MIB


def plan_of_1_tib(settings: Settings) -> Iterable[Comparison]:
    """Top has 1 TiB allocated, in order."""
    return _plan(settings, 1, shuffled=False)


def plan_of_1_tib_shuffled(settings: Settings) -> Iterable[Comparison]:
    """Top has 1 TiB allocated, in random order."""
    return _plan(settings, 1, shuffled=True)


def plan_of_10_tib(settings: Settings) -> Iterable[Comparison]:
    """Top has 10 TiB allocated, in order."""
    return _plan(settings, 10, shuffled=False)


def plan_of_10_tib_shuffled(settings: Settings) -> Iterable[Comparison]:
    """Top has 10 TiB allocated, in random order."""
    return _plan(settings, 10, shuffled=True)


def _plan(settings: Settings, tebibytes: int, *, shuffled: bool) -> Iterable[Comparison]:
    images = settings.scratch / "images"
    images.mkdir()
    settings.note("building images")
    base = create(images / "base.qcow2", tebibytes * TIB)
    top = images / "top.qcow2"
    write_allocated_image(top, tebibytes * TIB, shuffled=shuffled)
    let_stand_on(top, base)
    measure = ("qemu-img", "measure", "-f", "qcow2", "-O", "qcow2", str(top))
    outcomes = run_rounds(
        settings,
        (
            # The plan says that the file system lacks a TiB; it took all the work to find out.
            Contender("chainmerge", (settings.plan(top),), statuses=(0, 3)),
            Contender(_PEER, (measure,)),
        ),
        load_programs=program_loader(settings),
    )
    yield Comparison(
        f"plan, {tebibytes} TiB allocated{', shuffled' if shuffled else ''}",
        outcomes["chainmerge"],
        _PEER,
        outcomes[_PEER],
        limit=Limit(memory=_MEMORY_LIMIT),
    )
