# SPDX-License-Identifier: Apache-2.0
"""Merges that are done together must leave each other's images alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.merging.errors import DisksShareImage
from chainmerge.planning.locking import locks_needed
from chainmerge.storage.locks import LockMode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.chain.model import Identity
    from chainmerge.chain.target import Target
    from chainmerge.options import MergeOptions


def require_apart(merges: Sequence[tuple[Target, MergeOptions]]) -> None:
    """Raise DisksShareImage where one merge writes to what another one has in its chain."""
    for refusal in shared_images(merges):
        raise refusal


def shared_images(
    merges: Sequence[tuple[Target, MergeOptions]],
) -> Iterator[DisksShareImage]:
    """Images that one of the merges writes to and another one has in its chain."""
    users: dict[Identity, Target] = {}
    writers: dict[Identity, Target] = {}
    for target, options in merges:
        needed = list(locks_needed(target, options))
        top = str(target.chain.top.path)
        for image, mode in needed:
            known = users if mode is LockMode.WRITER else writers
            other = known.get(image.identity)
            if other is not None:
                yield DisksShareImage(str(image.path), str(other.chain.top.path), top)
        users |= {image.identity: target for image, _ in needed}
        writers |= {image.identity: target for image, mode in needed if mode is LockMode.WRITER}
