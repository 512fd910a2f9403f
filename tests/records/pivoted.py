# SPDX-License-Identifier: Apache-2.0
"""What a live merge of the active image leaves that has taken effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.records.identity import identify
from chainmerge.records.live_journal import VERSION, LiveJournal, LiveState

if TYPE_CHECKING:
    from pathlib import Path


def pivoted(base: Path, top: Path, top_since: str = "") -> LiveJournal:
    return LiveJournal(
        version=VERSION,
        address=["--qmp", "/run/vm", "--device", "disk"],
        job="job",
        base=identify(base),
        overlays=[identify(top)],
        above=None,
        backing_name=None,
        kept=[],
        stale=[],
        tombstones=[],
        delete=False,
        full_verify=True,
        state=LiveState.SETTLING,
        top_since=top_since,
    )
