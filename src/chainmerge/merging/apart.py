# SPDX-License-Identifier: Apache-2.0
"""Merges that are done together must leave each other's images alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.merging.errors import DisksShareImage
from chainmerge.planning.locking import locks_needed
from chainmerge.storage.locks import LockMode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from chainmerge.chain.model import Identity, ImageInfo
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
    return images_in_common(
        (
            target,
            [(image, mode is LockMode.WRITER) for image, mode in locks_needed(target, options)],
        )
        for target, options in merges
    )


def images_in_common(
    merges: Iterable[tuple[Target, Sequence[tuple[ImageInfo, bool]]]],
) -> Iterator[DisksShareImage]:
    """As :func:`shared_images`, of merges with their images, and whether each is written to."""
    users: dict[Identity, Target] = {}
    writers: dict[Identity, Target] = {}
    for target, images in merges:
        for image, is_written in images:
            other = (users if is_written else writers).get(image.identity)
            if other is not None:
                tops = (str(one.chain.top.path) for one in (other, target))
                yield DisksShareImage(str(image.path), *tops)
        users |= {image.identity: target for image, _ in images}
        writers |= {image.identity: target for image, is_written in images if is_written}
