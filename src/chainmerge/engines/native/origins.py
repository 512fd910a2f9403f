# SPDX-License-Identifier: Apache-2.0
"""The result's view after a merge, with what was moved into it traced back to where it came from.

What a transfer has written and read back need not be read again to compare the result with
top: it is enough that it maps each guest byte to a place into which the right byte was moved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chainmerge.arithmetic.distinct import distinct
from chainmerge.chain.view import NO_LAYER, GuestView, Resolved
from chainmerge.engines.native.moves import Moves, by_target, concatenated_moves
from chainmerge.qcow2.extents import Extents, Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class TracedView(GuestView, frozen=True):
    """What the guest sees of the result, in terms of the chain that was merged.

    ``layers`` are those of the whole chain, with the result in the place of the image that was
    written.

    Attributes:
        below: How many of the layers, from the root up, the result stands on.
        result: Which of the layers it is.
        origins: What was moved into it, by target, plain data only; None for nothing.
    """

    below: int
    result: int
    origins: Moves | None

    @property
    def virtual_size(self) -> int:
        """Bytes: the result's."""
        return self.layers[self.result].virtual_size

    def resolve(self, start: int = 0, end: int | None = None) -> Iterator[Resolved]:
        """As :meth:`GuestView.resolve` of the result, where data was moved to naming its origin."""
        end = self.virtual_size if end is None else end
        for runs in GuestView((*self.layers[: self.below], self.layers[self.result])).resolve(
            start, end
        ):
            in_result = runs.layer == self.below
            layer = np.where(in_result, np.int32(self.result), runs.layer)
            named = Resolved(runs.extents, layer)
            yield named if self.origins is None else _traced(named, self.result, self.origins)


def trace_of(parts: Sequence[Moves]) -> Moves | None:
    """What can be traced of what was moved: plain data."""
    plain = [part.take((part.kind == Kind.DATA) & (part.layer != NO_LAYER)) for part in parts]
    plain = [part for part in plain if len(part)]
    return by_target(concatenated_moves(plain)) if plain else None


def _traced(runs: Resolved, result: int, origins: Moves) -> Resolved:
    in_result = (runs.layer == result) & (runs.kind == Kind.DATA)
    if not in_result.any():
        return runs
    runs = _cut(runs, in_result, origins)
    place = np.searchsorted(origins.target, runs.host, "right") - 1
    known = (runs.layer == result) & (runs.kind == Kind.DATA) & (place >= 0)
    within = runs.host - origins.target[place]
    known &= within < origins.length[place]
    extents = runs.extents
    host = np.where(known, origins.host[place] + within, extents.host)
    traced = Extents(extents.guest, extents.length, extents.kind, host, extents.csize)
    return Resolved(traced, np.where(known, origins.layer[place], runs.layer))


def _cut(runs: Resolved, chosen: np.ndarray, origins: Moves) -> Resolved:
    """Runs cut where in base's file something else was moved to."""
    edges = distinct(np.concatenate([origins.target, origins.target + origins.length]))
    low = np.searchsorted(edges, runs.host, "right")
    high = np.searchsorted(edges, runs.host + runs.length, "left")
    count = np.where(chosen, np.maximum(high - low, 0), 0)
    if not count.any():
        return runs
    run = np.repeat(np.arange(len(count)), count)
    number = np.arange(len(run)) - np.repeat(np.cumsum(count) - count, count)
    cuts = runs.guest[run] + (edges[low[run] + number] - runs.host[run])
    bounds = np.concatenate([runs.guest, cuts])
    bounds.sort()
    return runs.cut_at(bounds)
