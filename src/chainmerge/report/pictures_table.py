# SPDX-License-Identifier: Apache-2.0
"""What was drawn of which chains, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.arithmetic.counting import counted
from chainmerge.report import layout
from chainmerge.report.layout import Block, stack, words

if TYPE_CHECKING:
    from chainmerge.documents.chain_pictures import ChainsPictures


def pictures_report(found: ChainsPictures, file: str) -> Block:
    """Which chains are in the file, and what could not be drawn."""
    listed = counted(len(found.chains), "chain")
    drawn = "all drawn" if len(found.pictures) == len(found.chains) else "listed"
    if drawn == "listed":
        drawn = f"{len(found.pictures)} of them drawn"
    return stack(
        words(f"{file}: {listed}, {drawn}; {counted(len(found.findings), 'finding')}", layout.GOOD),
        *layout.warnings_section(found.problems),
    )
