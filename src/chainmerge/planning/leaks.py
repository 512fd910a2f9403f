# SPDX-License-Identifier: Apache-2.0
"""Which leaked clusters may be given back: the rule, for whoever frees any.

A cluster that is marked used and that no table leads to is lost space, mostly. It can also be
the only copy of what a guest had, where the table that led to it is lost
(:mod:`chainmerge.qcow2.lost_tables`). So only those are freed without being asked that a merge
of ours has left. It notes, before it writes anything, which clusters are leaked already: all
others that are leaked later are its own. The note is in the journal of the merge, or in the
record of a pull, and is there as long as anything of the merge may be leaked.

Of bitmaps that do not count any more, since a program that does not know bitmaps has written to
the image, it is known whose the clusters are too. Clusters behind the end of the file hold
nothing, and are given back whoever marked them used.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from chainmerge.documents.plan import LeakFacts
from chainmerge.engines.metadata.leaks import EVERYWHERE, everywhere_but, with_kept
from chainmerge.engines.metadata.old_tree import void_bitmap_clusters
from chainmerge.errors import ChainmergeError
from chainmerge.qcow2.lost_tables import Sign, sign_of_lost_table
from chainmerge.qcow2.references import ReferenceCounts
from chainmerge.qcow2.runs import NO_RUNS, Runs, joined_runs, runs_in_both, runs_of, without_runs
from chainmerge.records.identity import identify, same_image
from chainmerge.records.live_journal import load_live_journal
from chainmerge.records.merge_journal import load_journal
from chainmerge.records.merged_record import load_merged_record

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from chainmerge.qcow2.check import CheckReport
    from chainmerge.qcow2.image import Qcow2Image
    from chainmerge.records.identity import ImageIdentity

NotedRanges = list[tuple[int, int]]
"""Ranges of clusters as a note has them: the first one, and how many there are."""

# As JSON, a few hundred KiB.
_MOST_NOTED: Final = 1 << 14
_AT_ONCE: Final = 1 << 20


class Leaks(Struct, frozen=True):
    """The leaked clusters of an image, and which of them stay.

    Attributes:
        cluster_size: Bytes.
        ours: How many a merge of ours has left, are of void bitmaps, or lie behind the end of
            the file.
        others: Those that somebody else has left, or nobody knows who.
        count: How many these are.
        hidden: How many of ours lie behind the end of the file.
        sign: What makes them look like the content of a lost L2 table; None if nothing does.
        kept: Those that stay, ascending: all of the others, or none.
        leaked: All that are leaked within the file.
    """

    cluster_size: int
    ours: int = 0
    others: Runs = NO_RUNS
    count: int = 0
    sign: Sign | None = None
    kept: Runs = NO_RUNS
    leaked: Runs = NO_RUNS
    hidden: int = 0

    @property
    def freed(self) -> Runs:
        """Where leaked clusters are given back."""
        return everywhere_but(self.kept)

    @property
    def any_freed(self) -> bool:
        """Whether there is anything to give back."""
        return bool(self.ours or (self.count and not len(self.kept.start)))

    @property
    def facts(self) -> LeakFacts:
        """What a plan says of them."""
        size = self.cluster_size
        reclaimed = self.count > 0 and not len(self.kept.start)
        sign = None if self.sign is None else self.sign.clause
        return LeakFacts(self.ours * size, self.count * size, sign, reclaimed=reclaimed)

    def all_freed(self) -> Leaks:
        """The same, of which none stays."""
        return replace(self, kept=NO_RUNS)


NO_LEAKS: Final = Leaks(0)


def find_leaks(
    image: Qcow2Image, report: CheckReport, references: ReferenceCounts, noted: Runs | None
) -> Leaks:
    """Which clusters of *image* are leaked, and which of them stay.

    Args:
        image: The image; its tables are sound.
        report: What a check of it has found.
        references: What that has counted.
        noted: What was leaked before a merge of ours, as :func:`leaked_before` has it.
    """
    size = image.header.cluster_size
    if not report.leaks:
        return Leaks(size, report.hidden_leaks, hidden=report.hidden_leaks)
    leaked = report.leaked
    unlisted = report.leaks - leaked.total
    others = leaked if noted is None else runs_in_both(leaked, noted)
    others = without_runs(others, runs_of(void_bitmap_clusters(image)))
    count = others.total
    sign = None
    if count or unlisted:
        unused = _unused(others, references)
        sign = sign_of_lost_table(image, unused)
    if unlisted:
        # More than a report lists; whose these are is not looked at.
        count += unlisted
        end = int(leaked.end[-1])
        rest = Runs(np.array([end]), np.array([EVERYWHERE.length[0] - end]))
        leaked, others = joined_runs([leaked, rest]), joined_runs([others, rest])
    ours = report.leaks - count + report.hidden_leaks
    return Leaks(size, ours, others, count, sign, others, leaked, report.hidden_leaks)


def _unused(leaked: Runs, references: ReferenceCounts) -> Runs:
    """Those of the leaked clusters that nothing uses, of many ranges the first ones.

    Others are in use, and counted too often.
    """
    found = [NO_RUNS]
    starts, lengths = leaked.start[:_MOST_NOTED].tolist(), leaked.length[:_MOST_NOTED].tolist()
    for start, length in zip(starts, lengths, strict=True):
        for first in range(start, start + length, _AT_ONCE):
            used = references.of(first, min(_AT_ONCE, start + length - first))
            found.append(runs_of(np.flatnonzero(used == 0) + first))
    return joined_runs(found)


def counted_as_used(references: ReferenceCounts, kept: Runs) -> ReferenceCounts:
    """The same, with every one of the *kept* clusters used at least once."""
    if not len(kept.start):
        return references
    counts = with_kept(references.counts, kept)
    return ReferenceCounts(references.cluster_size, counts, references.complete)


# Notes


def leaked_before(image: Path) -> Runs | None:
    """What was leaked in *image* before merges of ours that have not come to their end.

    None if no such merge has left a note. Raises what opening a file raises.
    """
    notes = [ranges for whose, ranges in _notes(image) if same_image(whose, identify(image))]
    if not notes:
        return None
    before = EVERYWHERE
    for ranges in notes:
        before = runs_in_both(before, from_note(ranges))
    return before


def _notes(image: Path) -> Iterator[tuple[ImageIdentity, NotedRanges]]:
    # What cannot be read says nothing, and who needs it for more will say so.
    with contextlib.suppress(ChainmergeError):
        journal = load_journal(image)
        if journal is not None and journal.leaked_before is not None:
            yield journal.base, journal.leaked_before
    with contextlib.suppress(ChainmergeError):
        live = load_live_journal(image)
        if live is not None and live.leaked_before is not None:
            yield live.result, live.leaked_before
    record = load_merged_record(image)
    if record is not None and record.pulled is not None:
        pulled = record.pulled
        if pulled.leaked_before is not None:
            yield record.result_identity, pulled.leaked_before


def to_note(runs: Runs) -> NotedRanges:
    """*runs* for a note: at most 16384 ranges, for which small gaps between them go under."""
    if len(runs.start) > _MOST_NOTED:
        gaps = runs.start[1:] - runs.end[:-1]
        opens = np.sort(np.argpartition(gaps, -(_MOST_NOTED - 1))[-(_MOST_NOTED - 1) :])
        first = runs.start[np.concatenate(([0], opens + 1))]
        end = runs.end[np.concatenate((opens, [len(runs.start) - 1]))]
        runs = Runs(first, end - first)
    return list(zip(runs.start.tolist(), runs.length.tolist(), strict=True))


def from_note(ranges: Sequence[tuple[int, int]] | None) -> Runs:
    """The runs of a note, ascending; everything where nothing was noted.

    Journals of earlier versions say nothing of leaked clusters: any may have been there before.
    """
    if ranges is None:
        return EVERYWHERE
    highest = int(EVERYWHERE.length[0])
    first = np.array([min(max(0, one), highest) for one, _ in ranges], dtype=np.int64)
    count = np.array([min(max(0, one), highest) for _, one in ranges], dtype=np.int64)
    return joined_runs([Runs(first, np.minimum(count, highest - first))])
