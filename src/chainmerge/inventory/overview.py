# SPDX-License-Identifier: Apache-2.0
"""The chains of a directory, a summary each. No image is locked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from chainmerge.documents.chains import ChainsReport
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.inventory.leaves import images_in
from chainmerge.inventory.summary import (
    chain_facts,
    images_of_merges,
    most_freed_first,
    summary_of,
)
from chainmerge.options import Access
from chainmerge.records.unfinished import status
from chainmerge.storage.bystanders import openers_of

if TYPE_CHECKING:
    from chainmerge.chain.model import Identity


def list_chains(directory: str | Path = ".", access: Access | None = None) -> ChainsReport:
    """Summarise the chains whose leaves lie in a directory; what is below it is left out.

    A chain that cannot be read is a summary as well, which says why. Users of the images in
    other directories are not looked for: the plan of a merge does that.

    Args:
        directory: where the leaves lie. Images below them may lie elsewhere, if *access* allows.
        access: how images may be reached.

    Raises:
        DirectoryUnreadable, DirectoryTooLarge
    """
    access = access or Access()
    home = Path(os.path.realpath(directory))
    found = images_in(home)
    openers = openers_of(found.images)
    unfinished = images_of_merges(status([home]).merges)
    occupied: dict[Identity, int] = {}
    summaries = []
    for leaf in found.leaves:
        facts = chain_facts(leaf, access, found.users)
        occupied |= facts.occupied
        summaries.append(summary_of(leaf, facts, openers, unfinished))
    return ChainsReport(
        version=REPORT_VERSION,
        directory=str(home),
        chains=tuple(sorted(summaries, key=most_freed_first)),
        occupied_bytes=sum(occupied.values()),
        freed_bytes=sum(summary.freed_bytes or 0 for summary in summaries),
    )
