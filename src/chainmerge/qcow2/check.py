# SPDX-License-Identifier: Apache-2.0
"""The consistency check: do the stored refcounts agree with what the tables use?

The verdict is that of ``qemu-img check`` (QEMU 7.2), with the same number of leaks; see
:mod:`chainmerge.qcow2.references` for where this one is stricter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from chainmerge.arithmetic.counting import counted
from chainmerge.qcow2.l2_tables import NO_TABLES, KnownTables
from chainmerge.qcow2.refcounts import (
    StoredRefcounts,
)
from chainmerge.qcow2.references import (
    Findings,
    ReferenceCounts,
    count_references,
)
from chainmerge.qcow2.runs import NO_RUNS, Clusters, Runs

if TYPE_CHECKING:
    from chainmerge.qcow2.image import Qcow2Image

#: A report names at most so many ranges of leaked clusters (16 MiB of them).
MAX_LEAKED_RANGES = 1 << 20


class CheckReport(Struct, frozen=True):
    """What the check found.

    Attributes:
        image: the image's name.
        corruptions: as ``qemu-img check`` counts them, at least one if QEMU finds one or does not
        open the image.
        leaks: clusters whose stored refcount is higher than it need be; 0 unless *complete*.
        overlaps: references to clusters of metadata by something else, whether or not the
            refcounts allow for it. QEMU does not look for these.
        copied_mismatches: how many of the corruptions are wrong COPIED flags.
        complete: whether all references could be counted.
        image_end_offset: file offset behind the last cluster in use, in bytes.
        leaked: the leaked clusters, in at most MAX_LEAKED_RANGES runs that do not touch; no more
            than *leaks*.
        messages: what is wrong, in words, at most 100.
        hidden_leaks: clusters behind the end of the file that have a refcount. Nobody counts
            them as leaks before the file grows over them.
        shared_leaks: of the leaks, clusters that one table uses and that have a refcount of
            2 or more. To free the surplus takes a change of their COPIED flags as well.
    """

    image: str
    corruptions: int
    leaks: int
    overlaps: int
    copied_mismatches: int
    complete: bool
    image_end_offset: int
    leaked: Runs
    messages: tuple[str, ...]
    hidden_leaks: int = 0
    shared_leaks: int = 0

    @property
    def sound(self) -> bool:
        """Whether the image can be written to: leaks at most are wrong with it."""
        return self.complete and not self.corruptions and not self.overlaps

    @property
    def clean(self) -> bool:
        """Whether nothing at all is wrong."""
        return self.sound and not self.leaks

    @property
    def only_leaks(self) -> bool:
        """Whether clusters are leaked and nothing else is wrong."""
        return self.sound and self.leaks > 0


def check(image: Qcow2Image, tables: KnownTables = NO_TABLES) -> CheckReport:
    """Recompute all refcounts and compare them with the stored ones.

    Damage does not raise, it is reported. The dirty and corrupt bits of the header are ignored.

    Args:
        image: the image.
        tables: what has been read of its L2 tables, if nobody can have changed them since.

    Raises:
        TooManyClusters: the file is larger than QEMU would check.
    """
    findings, stored = Findings(), StoredRefcounts(image)
    references = count_references(image, findings, stored, tables)
    return _report(image, references, findings, stored)


def computed_refcounts(image: Qcow2Image) -> ReferenceCounts:
    """How often each cluster is used according to the tables.

    Raises:
        TooManyClusters: the file is larger than QEMU would check.
    """
    return count_references(image, Findings(), StoredRefcounts(image))


def check_with_references(image: Qcow2Image) -> tuple[CheckReport, ReferenceCounts]:
    """Like :func:`check` and :func:`computed_refcounts`, at the cost of one of them.

    A writer may use a cluster whose stored and computed refcounts are both 0, if the report
    is ``sound``.

    Raises:
        TooManyClusters: the file is larger than QEMU would check.
    """
    findings, stored = Findings(), StoredRefcounts(image)
    references = count_references(image, findings, stored)
    return _report(image, references, findings, stored), references


def compare_refcounts(image: Qcow2Image, references: ReferenceCounts) -> CheckReport:
    """As :func:`check`, of an image whose references were counted, and are what they were.

    Only the refcounts are read. All references could be counted, and none of them was wrong.
    """
    return _report(image, references, Findings(), StoredRefcounts(image))


def _report(
    image: Qcow2Image,
    references: ReferenceCounts,
    findings: Findings,
    stored: StoredRefcounts,
) -> CheckReport:
    comparison = _compare(references, findings, stored)
    return CheckReport(
        image=image.name,
        corruptions=findings.corruptions,
        leaks=comparison.leaks,
        overlaps=findings.overlaps,
        copied_mismatches=findings.copied_mismatches,
        complete=findings.complete,
        image_end_offset=comparison.end * image.header.cluster_size,
        leaked=comparison.leaked,
        messages=tuple(findings.messages),
        hidden_leaks=stored.in_use_from(len(references.counts)),
        shared_leaks=comparison.shared_leaks,
    )


class _Comparison(Struct, frozen=True):
    leaks: int
    shared_leaks: int
    leaked: Runs
    end: int
    """The cluster behind the last one with any refcount."""


def _compare(
    references: ReferenceCounts, findings: Findings, refcounts: StoredRefcounts
) -> _Comparison:
    counts = references.counts
    leaks = shared_leaks = end = 0
    runs = _RunList(MAX_LEAKED_RANGES)
    for first, stored in refcounts.windows(len(counts)):
        used = counts[first : first + len(stored)]
        too_low = np.flatnonzero(stored < used)
        if len(too_low):
            at = int(too_low[0])
            findings.corrupt(
                len(too_low),
                f"refcounts too low for {counted(len(too_low), 'cluster')}, such as cluster "
                f"{first + at}: refcount {stored[at]}, used {counted(int(used[at]), 'time')}",
            )
        in_use = np.flatnonzero((stored != 0) | (used != 0))
        if len(in_use):
            end = first + int(in_use[-1]) + 1
        if findings.complete:
            too_high = np.flatnonzero(stored > used)
            leaks += len(too_high)
            shared_leaks += int(np.count_nonzero(used[too_high] == 1))
            runs.add(too_high + first)
    if leaks:
        findings.note(f"{counted(leaks, 'leaked cluster')}")
    return _Comparison(leaks, shared_leaks, runs.runs(), end)


class _RunList:
    """Collects ascending cluster numbers as ranges, up to a number of these."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._first: list[Clusters] = []
        self._end: list[Clusters] = []
        self._length = 0

    def add(self, clusters: Clusters) -> None:
        if not len(clusters) or self._length >= self._most:
            return
        breaks = np.flatnonzero(np.diff(clusters) != 1)
        room = self._most - self._length
        first = clusters[np.concatenate(([0], breaks + 1))][:room]
        end = clusters[np.concatenate((breaks, [len(clusters) - 1]))][:room] + 1
        self._first.append(first)
        self._end.append(end)
        self._length += len(first)

    def runs(self) -> Runs:
        if not self._first:
            return NO_RUNS
        first, end = np.concatenate(self._first), np.concatenate(self._end)
        # A range may go on from one addition to the next.
        opens = np.concatenate(([True], first[1:] != end[:-1]))
        closes = np.concatenate((opens[1:], [True]))
        return Runs(first[opens], end[closes] - first[opens])
