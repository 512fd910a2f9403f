# SPDX-License-Identifier: Apache-2.0
"""What moves in a merge: guest bytes, counted by what the tables say of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from chainmerge.arithmetic.distinct import distinct
from chainmerge.chain.readability import require_data_in_files
from chainmerge.chain.view import NO_LAYER, in_step
from chainmerge.documents.plan import Movement
from chainmerge.qcow2.mapping import Kind

if TYPE_CHECKING:
    from chainmerge.chain.opening import OpenChain
    from chainmerge.chain.target import Target


class GuestBytes(Struct, frozen=True):
    """Guest bytes that the merged range and base define.

    ``undefined`` are those that base does not define yet, ``undefined_zeros`` those of them that
    read as zeros in base all the same.
    """

    data: int
    zero: int
    compressed: int
    pull: int
    undefined: int
    undefined_zeros: int


def measure_guest_bytes(target: Target, opened: OpenChain) -> GuestBytes:
    """Count what moves, what would move the other way, and what base does not define yet.

    All in guest bytes. Reads the tables of all images of the range and of base, once.
    """
    size = target.chain.top.virtual_size
    base_size = target.base.virtual_size
    below_base = target.chain.images[: target.base_index]
    backing_end = below_base[-1].virtual_size if below_base else 0
    merged = opened.view(target.base_index + 1)
    base = opened.view(target.base_index, target.base_index + 1)
    top_layer = len(merged.layers) - 1
    data = zero = compressed = pull = undefined = undefined_zeros = 0
    for upper, lower in in_step(merged.resolve(0, size), base.resolve(0, size)):
        require_data_in_files(merged, upper)
        by_kind = np.bincount(upper.kind, weights=upper.length, minlength=len(Kind))
        data += int(by_kind[Kind.DATA])
        zero += int(by_kind[Kind.ZERO] + by_kind[Kind.ZERO_ALLOCATED])
        compressed += int(by_kind[Kind.COMPRESSED])
        # Data has a layer, other than zeros: that between base and top goes up as well.
        comes_up = (upper.layer != NO_LAYER) & (upper.layer != top_layer)
        pull += int(upper.length[comes_up].sum())
        bounds = distinct(np.concatenate([upper.guest, lower.guest]))
        above, below = upper.cut_at(bounds), lower.cut_at(bounds)
        free = above.kind == Kind.UNALLOCATED
        stored = (below.kind == Kind.DATA) | (below.kind == Kind.COMPRESSED)
        pull += int(below.length[free & stored].sum())
        nothing = (below.kind == Kind.UNALLOCATED) | (bounds >= base_size)
        # Where nothing is below base, what it leaves open reads as zeros.
        as_zeros = (above.kind == Kind.ZERO) | (above.kind == Kind.ZERO_ALLOCATED)
        nothing &= ~as_zeros | (bounds < backing_end)
        undefined += int(below.length[~free & nothing].sum())
        nothing &= (bounds >= backing_end) & (bounds < base_size)
        undefined_zeros += int(below.length[~free & nothing].sum())
    return GuestBytes(data, zero, compressed, pull, undefined, undefined_zeros)


def movement_of(volumes: GuestBytes) -> Movement:
    """The figures of a plan, as far as they do not depend on the engine."""
    return Movement(volumes.data, volumes.zero, volumes.compressed)
