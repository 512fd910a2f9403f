# SPDX-License-Identifier: Apache-2.0
"""Whether the header of the result can say what it has to, found out before anything is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from chainmerge.bitmaps.sets import result_set
from chainmerge.engines.metadata.errors import BackingNameUnfit, HeaderFull
from chainmerge.engines.metadata.header import compose_header, content_of
from chainmerge.options import Direction
from chainmerge.planning.aftermath import new_backing
from chainmerge.qcow2.features import BitmapsExtension

if TYPE_CHECKING:
    from chainmerge.bitmaps.gathering import BitmapFacts
    from chainmerge.chain.opening import OpenImage
    from chainmerge.errors import ChainmergeError
    from chainmerge.planning.facts import MergeFacts


def header_obstacle(
    result: OpenImage, facts: MergeFacts, bitmaps: BitmapFacts
) -> ChainmergeError | None:
    """Why the header of *result*, which is written, has no room for what it is to say."""
    image = result.image
    if image is None or facts.result_check is None or not facts.result_check.sound:
        return None
    header = image.header
    size = max(header.virtual_size, facts.top.virtual_size)
    content = replace(content_of(header), virtual_size=size)
    if facts.direction is Direction.PULL:
        name, its_format = new_backing(facts) or (None, None)
        content = replace(content, backing_name=name, backing_format=its_format)
    if result.info.supports_bitmaps:
        count = len(result_set(bitmaps, size, facts.direction))
        # Where it will be makes no difference to how much room that takes.
        extension = BitmapsExtension(count, header.cluster_size, header.cluster_size)
        content = replace(content, bitmaps=extension if count else None, bitmaps_trusted=count > 0)
    try:
        compose_header(image.name, image.readable.read(0, header.cluster_size), header, content)
    except (HeaderFull, BackingNameUnfit) as error:
        return error
    return None
