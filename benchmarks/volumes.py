# SPDX-License-Identifier: Apache-2.0
"""The demo's scenario on a volume that has room for either way."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from benchmarks import copies
from benchmarks.harness import Comparison, Contender, run_rounds
from benchmarks.images import MIB, program_loader
from benchmarks.resident import Resident
from demo.scenario import DATA_SIZE, GOOD, GRANULARITY, Workshop
from demo.volumes import loop_volume
from tests.support.qemu import bitmap_names

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from benchmarks.harness import Settings

_PEER: Final = "qemu-img, 20 commands"
_BY_API: Final = "by the API"
_WAYS: Final = {
    "metadata": "--verify metadata",
    "full": "--verify full",
    _BY_API: "full, by the API in a process that runs already",
}
_STALE: Final = 14
_VOLUME: Final = 512 * MIB
_IMAGE: Final = ("-f", "qcow2")


def merge_with_stale_bitmaps(settings: Settings) -> Iterable[Comparison]:
    """126 MiB and a bitmap into a base with 14 stale ones, against vdsm's sequence."""
    with loop_volume(settings.scratch, _VOLUME, "--direct-io=on") as volume:
        settings.note("building images")
        workshop = Workshop(settings.scratch)
        top = workshop.case(volume, _STALE).top

        def prepare() -> None:
            workshop.case(volume, _STALE)

        def check() -> None:
            assert set(bitmap_names(volume.path)) == {GOOD}

        def merge_verifying(level: str) -> Contender:
            merge = settings.merge(top, "--verify", level, *volume.merge_arguments)
            return Contender(level, (merge,), prepare, check=check)

        with Resident() as resident:
            by_api = partial(resident.merge, top, volume.path.parent, engine=settings.engine)
            outcomes = run_rounds(
                settings,
                (
                    merge_verifying("metadata"),
                    Contender(_PEER, tuple(_sequence(top, volume.path)), prepare, check=check),
                    merge_verifying("full"),
                    Contender(_BY_API, (), prepare, check=check, call=by_api),
                    copies.direct_copy(settings.scratch, DATA_SIZE),
                ),
                load_programs=program_loader(settings),
            )
    for level in ("metadata", "full", _BY_API):
        yield Comparison(
            f"merge with {_STALE} stale bitmaps, block device, {_WAYS[level]}",
            outcomes[level],
            _PEER,
            outcomes[_PEER],
            outcomes[copies.NAME],
        )


def _sequence(top: Path, base: Path) -> Iterable[tuple[str, ...]]:
    """What vdsm runs for a cold merge."""
    info = ("qemu-img", "info", "--output=json", *_IMAGE, str(base))
    yield info
    for number in range(1, _STALE + 1):
        yield ("qemu-img", "bitmap", "--remove", *_IMAGE, str(base), f"stale-{number}")
    yield ("qemu-img", "measure", "--output=json", *_IMAGE, "-O", "qcow2", str(top))
    yield ("qemu-img", "commit", "-q", "-t", "none", *_IMAGE, "-d", "-b", str(base), str(top))
    yield info
    yield ("qemu-img", "bitmap", "--add", *_IMAGE, "-g", str(GRANULARITY), str(base), GOOD)
    yield (
        *("qemu-img", "bitmap", "--merge", GOOD, "-F", "qcow2", "-b", str(top)),
        *(*_IMAGE, str(base), GOOD),
    )
