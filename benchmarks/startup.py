# SPDX-License-Identifier: Apache-2.0
"""What it costs to start, with everything in memory: scripts run us once for each disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from benchmarks.harness import CHAINMERGE, Comparison, Contender, Limit, run_rounds
from benchmarks.images import GIB
from tests.support.qemu import create

if TYPE_CHECKING:
    from collections.abc import Iterable

    from benchmarks.harness import Settings

_VERSION: Final = "qemu-img --version"
_COMMIT: Final = "qemu-img commit -t none -d"


def start(settings: Settings) -> Iterable[Comparison]:
    """`chainmerge --version`."""
    outcomes = run_rounds(
        settings,
        (
            Contender("chainmerge", ((*CHAINMERGE, "--version"),)),
            Contender(_VERSION, (("qemu-img", "--version"),)),
        ),
        load_programs=None,
    )
    yield Comparison(
        "--version", outcomes["chainmerge"], _VERSION, outcomes[_VERSION], limit=Limit(cpu=0.05)
    )


def merge_of_an_empty_overlay(settings: Settings) -> Iterable[Comparison]:
    """An overlay without any data."""
    base = create(settings.scratch / "base.qcow2", GIB)
    top = create(settings.scratch / "top.qcow2", backing=base)
    commit = ("qemu-img", "commit", "-q", "-t", "none", "-d", str(top))
    outcomes = run_rounds(
        settings,
        (
            Contender("chainmerge", (settings.merge(top),)),
            Contender(_COMMIT, (commit,)),
        ),
        load_programs=None,
    )
    yield Comparison(
        "merge of an empty overlay",
        outcomes["chainmerge"],
        _COMMIT,
        outcomes[_COMMIT],
        limit=Limit(cpu=0.2),
    )
