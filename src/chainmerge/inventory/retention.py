# SPDX-License-Identifier: Apache-2.0
"""Which snapshots go and which stay. Pure: facts and rules in, fates out.

In a chain root <- s1 <- s2 <- ... <- leaf each image below the leaf is a snapshot: what the guest's
disk was when the image above it was made. That view goes or stays; the leaf's always stays. Where
the views of neighbours go, their images and the next one above, whose view stays, become one image.
"""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from itertools import accumulate
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from chainmerge.arithmetic.counting import counted
from chainmerge.arithmetic.durations import spelled_duration
from chainmerge.documents.retention import RetentionRule, SnapshotFate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from chainmerge.options import Retention

NOTHING_HELD: Final[Mapping[int, str]] = MappingProxyType({})


class ViewFacts(Struct, frozen=True):
    """An image below the leaf, and what decides on it.

    Attributes:
        path: Its path.
        real_path: The same with links resolved; empty if there are none.
        written: When it was last written, in seconds since 1970; None if nothing tells.
        occupied: Bytes of its file system that it takes; None for a device.
        branches: Images outside the chain that stand on it.
        in_use: Why no merge gets it for itself, in a sentence; None if one does.
        not_removable: Why no merge can take it away, in a sentence; None if one can.
        checkpoints: Checkpoints that backups can use and that begin with the image above it.
    """

    path: str
    written: float | None = None
    occupied: int | None = None
    branches: tuple[str, ...] = ()
    in_use: str | None = None
    not_removable: str | None = None
    checkpoints: tuple[str, ...] = ()
    real_path: str = ""


class Span(Struct, frozen=True):
    """Images that become one, by their indexes in the chain: from *base* up to *top*."""

    base: int
    top: int


def judge(
    snapshots: Sequence[ViewFacts],
    retention: Retention,
    now: float,
    held: Mapping[int, str] = NOTHING_HELD,
) -> tuple[SnapshotFate, ...]:
    """Decide on every snapshot of a chain.

    Args:
        snapshots: the images below the leaf, from the root up.
        retention: the rules.
        now: seconds since 1970.
        held: by index, snapshots whose merge would lose a checkpoint that backups can use, and
            why, in a sentence.
    """
    times = ages_of(snapshots)
    fates = [
        _judged(index, snapshot, times[index], len(snapshots), retention, now, held.get(index))
        for index, snapshot in enumerate(snapshots)
    ]
    # From above: what stays because of a neighbour has the one above it decided already.
    for index in range(len(fates) - 2, -1, -1):
        above = snapshots[index + 1]
        if not fates[index].stays and fates[index + 1].stays and above.in_use is not None:
            reason = f"it would become one with {os.path.basename(above.path)}: {above.in_use}"  # noqa: PTH119
            fates[index] = _fate(snapshots[index], times[index], RetentionRule.IN_USE, reason)
    return tuple(fates)


def names_nothing(retention: Retention, snapshots: Sequence[ViewFacts]) -> bool:
    """Whether patterns alone say what stays, and no snapshot has a name like any of them."""
    if not retention.keep or retention.keep_last is not None or retention.keep_within is not None:
        return False
    return not any(_is_named(one, pattern) for one in snapshots for pattern in retention.keep)


def _is_named(snapshot: ViewFacts, pattern: str) -> bool:
    # Who names a file may mean it by either name, and what is not kept is gone.
    paths = filter(None, (snapshot.path, snapshot.real_path))
    names = [os.path.basename(path) for path in paths]  # noqa: PTH119 (they need not be paths here)
    return any(fnmatchcase(name, pattern) for name in names)


def ages_of(snapshots: Sequence[ViewFacts]) -> tuple[float | None, ...]:
    """How old each is, as seconds since 1970: when it was last written, as far as that is known.

    None of them is younger than the next one, which was made after it. So one that a merge has
    written to since is as old as the next one, and not as young as that merge.
    """
    downwards = (one.written for one in reversed(snapshots))
    return tuple(accumulate(downwards, _earlier))[::-1]


def _earlier(above: float | None, below: float | None) -> float | None:
    if above is None or below is None:
        return below if above is None else above
    return min(above, below)


def _judged(
    index: int,
    snapshot: ViewFacts,
    written: float | None,
    count: int,
    retention: Retention,
    now: float,
    held: str | None,
) -> SnapshotFate:
    kept = next(_kept_by_rules(index, snapshot, written, count, retention, now), None)
    rule, reason = kept or next(_kept_anyway(snapshot, held), _GOES)
    return _fate(snapshot, written, rule, reason)


_GOES: Final = (RetentionRule.NO_RULE, "no rule keeps it")


def _fate(
    snapshot: ViewFacts, written: float | None, rule: RetentionRule, reason: str
) -> SnapshotFate:
    return SnapshotFate(
        image=snapshot.path,
        written_at=None if written is None else int(written),
        occupied_bytes=snapshot.occupied,
        stays=rule is not RetentionRule.NO_RULE,
        rule=rule,
        reason=reason,
    )


def _kept_by_rules(
    index: int,
    snapshot: ViewFacts,
    written: float | None,
    count: int,
    retention: Retention,
    now: float,
) -> Iterator[tuple[RetentionRule, str]]:
    last = retention.keep_last
    if last is not None and index >= count - last:
        words = "it is the last one" if last == 1 else f"it is one of the last {last}"
        yield RetentionRule.KEEP_LAST, words
    within = retention.keep_within
    if within is not None and written is not None and written >= now - within:
        yield RetentionRule.KEEP_WITHIN, f"it is not older than {spelled_duration(within)}"
    for pattern in retention.keep:
        if _is_named(snapshot, pattern):
            yield RetentionRule.KEEP, f"its name matches {pattern}"
    if retention.keep_checkpoints and snapshot.checkpoints:
        first, *more = snapshot.checkpoints
        others = f" and {counted(len(more), 'more checkpoint')}" if more else ""
        begins = "begin" if more else "begins"
        yield RetentionRule.KEEP_CHECKPOINTS, f"checkpoint {first!r}{others} {begins} there"
    if within is not None and written is None:
        yield RetentionRule.AGE_UNKNOWN, "nothing tells how old it is"


def _kept_anyway(snapshot: ViewFacts, held: str | None) -> Iterator[tuple[RetentionRule, str]]:
    if snapshot.branches:
        first, *more = snapshot.branches
        others = f" and {counted(len(more), 'more image')}" if more else ""
        stand = "stand" if more else "stands"
        yield RetentionRule.OTHER_BRANCH, f"{first}{others} {stand} on it"
    if snapshot.in_use is not None:
        yield RetentionRule.IN_USE, snapshot.in_use
    if snapshot.not_removable is not None:
        yield RetentionRule.NOT_REMOVABLE, snapshot.not_removable
    if held is not None:
        yield RetentionRule.BITMAPS, held


def spans_of(fates: Sequence[SnapshotFate]) -> tuple[Span, ...]:
    """The images that become one, the uppermost ones first.

    That order is the one in which they are merged: checkpoints that are broken are gone from the
    images above by the time that those below are merged, and need no tombstones there.
    """
    spans: list[Span] = []
    lowest: int | None = None
    for index, fate in enumerate(fates):
        if not fate.stays:
            lowest = index if lowest is None else lowest
        elif lowest is not None:
            spans.append(Span(lowest, index))
            lowest = None
    if lowest is not None:
        spans.append(Span(lowest, len(fates)))
    return tuple(reversed(spans))
