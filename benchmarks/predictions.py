# SPDX-License-Identifier: Apache-2.0
"""How long a plan says that a merge takes, and how long it takes."""

from __future__ import annotations

import json
import random
import subprocess
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from benchmarks.caches import can_drop_caches, drop_caches
from benchmarks.harness import CHAINMERGE, ENVIRONMENT, Comparison, Run
from benchmarks.images import CLUSTER, GIB, MIB, random_clusters, write_clusters
from tests.support.qemu import create, qemu_io

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from benchmarks.harness import Settings

_DISK: Final = 8 * GIB
_LEARNED: Final = 10
_FORETOLD: Final = 10
_SMALLEST, _LARGEST = 32 * MIB, GIB


def prediction(settings: Settings) -> Iterable[Comparison]:
    """Ten merges of 32 MiB to 1 GiB that were foretold, after ten others; the peer is the plan."""
    draw = random.Random(1)
    taken, foretold = [], []
    for number in range(_LEARNED + _FORETOLD):
        size = int(_SMALLEST * (_LARGEST / _SMALLEST) ** draw.random())
        top = _overlay(settings.scratch, number, size, scattered=number % 2 == 0)
        if can_drop_caches():
            drop_caches()
        planned = _asked(settings, "plan", top)
        merged = _asked(settings, "merge", top)
        for image in settings.scratch.glob("*.qcow2"):
            image.unlink()
        settings.note(f"{size // MIB} MiB: {planned['prediction']}, took {merged['seconds']:.2f} s")
        if number >= _LEARNED:
            taken.append(Run(merged["seconds"], 0, 0.0))
            foretold.append(Run(planned["prediction"]["seconds"], 0, 0.0))
    errors = [
        abs(said.seconds / run.seconds - 1) for said, run in zip(foretold, taken, strict=True)
    ]
    yield Comparison(
        f"time of a merge after {_LEARNED} others: median error {median(errors):.0%}",
        tuple(taken),
        "what the plan says",
        tuple(foretold),
    )


def _overlay(place: Path, number: int, size: int, *, scattered: bool) -> Path:
    base = create(place / f"base-{number}.qcow2", _DISK)
    top = create(place / f"top-{number}.qcow2", backing=base.name)
    if scattered and size < 128 * MIB:
        write_clusters(top, random_clusters(max(1, size // CLUSTER), _DISK, seed=number))
    else:
        qemu_io(top, f"write -q -P 1 0 {size // CLUSTER * CLUSTER}")
    return top


def _asked(settings: Settings, command: str, top: Path) -> Any:
    ran = subprocess.run(
        (*CHAINMERGE, command, "--json", "--engine", settings.engine, str(top)),
        capture_output=True,
        check=True,
        env={**ENVIRONMENT, "XDG_STATE_HOME": str(settings.scratch / "state")},
    )
    return json.loads(ran.stdout.splitlines()[-1])
