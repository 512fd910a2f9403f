# SPDX-License-Identifier: Apache-2.0
"""What data needs that is written at its guest offset: in a raw image, or a data file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from chainmerge.engines.native.raw import data_ranges
from chainmerge.options import Placement
from chainmerge.planning.space.figures import SpaceSurvey, facts_of_need
from chainmerge.planning.space.need import raw_space_need
from chainmerge.qcow2.mapping import Kind
from chainmerge.storage.file_space import ByteRanges, space_to_count
from chainmerge.storage.locks import AnyFile

if TYPE_CHECKING:
    from chainmerge.chain.opening import OpenChain
    from chainmerge.chain.target import Target


def survey_raw(target: Target, opened: OpenChain, size_after: int, *, shares: bool) -> SpaceSurvey:
    """What a raw base needs: as a file space for the data alone, as a volume its size."""
    base = opened.images[target.base_index]
    facts = facts_of_need(raw_space_need(base.info.file_size, size_after))
    facts = replace(facts, allocates=missing_in_place(target, opened, shares=shares))
    return SpaceSurvey({Placement.IN_PLACE: facts}, {}, None, None)


def data_in_place(target: Target, opened: OpenChain, *, shares: bool) -> ByteRanges:
    """Where data is written at its guest offset: into a raw base, or an external data file.

    Without what the file system can share, if it *shares*.
    """
    kinds = (Kind.COMPRESSED,) if shares else (Kind.DATA, Kind.COMPRESSED)
    return data_ranges(opened.view(target.base_index + 1), kinds)


def missing_in_place(target: Target, opened: OpenChain, *, shares: bool) -> int | None:
    """Bytes that the file system has to give for :func:`data_in_place`; None for a device."""
    source = opened.images[target.base_index].layer.source
    space = space_to_count(source) if isinstance(source, AnyFile) else None
    return None if space is None else space.missing(data_in_place(target, opened, shares=shares))
