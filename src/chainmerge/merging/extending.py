# SPDX-License-Identifier: Apache-2.0
"""Reserves the space for the whole merge before the first write."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from chainmerge.chain.reading import open_for_writing
from chainmerge.documents.plan import EngineName
from chainmerge.documents.progress import Stage
from chainmerge.engines.metadata.steps import reserve_holes
from chainmerge.errors import ChainmergeError
from chainmerge.options import Direction
from chainmerge.planning.choices import shares_extents
from chainmerge.planning.space.raw import data_in_place
from chainmerge.storage.file_space import space_of
from chainmerge.storage.files import WritablePort
from chainmerge.storage.volume_facts import VolumeKind
from chainmerge.storage.volumes import FileVolume, LvmVolume, volume_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.merging.job import Job
    from chainmerge.storage.volumes import Volume


@contextlib.contextmanager
def extended(job: Job) -> Iterator[None]:
    """Reserve the space for the whole merge; what is not used is given back."""
    is_raw_file = job.result.header is None and job.facts.volume.kind is VolumeKind.FILE
    with _holes_reserved(job), contextlib.nullcontext() if is_raw_file else _grown(job):
        yield


@contextlib.contextmanager
def _grown(job: Job) -> Iterator[None]:
    """Make base's volume, or the space behind the end of its file, as large as the merge needs."""
    grows = job.plan.space.grow_to is not None
    extends_pool = job.plan.space.extends_pool
    if not (grows or extends_pool) and job.facts.end_before is None:
        yield
        return
    volume = volume_at(job.result.real_path, job.request.options)
    if extends_pool and isinstance(volume, LvmVolume):
        job.request.announce(Stage.EXTEND)
        volume.extend_pool(job.plan.space.allocates or 0)
    if grows:
        job.request.announce(Stage.EXTEND)
        volume.grow_to(job.plan.space.required)
        volume.make_growth_durable()
    _wipe_behind_disk(job, volume)
    try:
        yield
    finally:
        with contextlib.suppress(ChainmergeError):
            volume.release_reservation()


@contextlib.contextmanager
def _holes_reserved(job: Job) -> Iterator[None]:
    """Reserve space in a raw file, or an external data file, for all data that is written there."""
    place = job.base.real_path if job.base.header is None else job.base.data_file
    if place is None or job.facts.direction is Direction.PULL or not place.is_file():
        yield
        return
    shares = job.plan.engine is EngineName.NATIVE and shares_extents(
        job.opened, job.target.base_index, job.facts.direction
    )
    written = data_in_place(job.target, job.opened, shares=shares)
    data_file = job.base.data_file
    with open_for_writing(job.base) if data_file is None else WritablePort(data_file) as port:
        space = space_of(port)
        assert space is not None
        reserve_holes(port, space.holes(written))
    try:
        yield
    finally:
        with contextlib.suppress(ChainmergeError):
            FileVolume(str(place)).release_reservation()


def _wipe_behind_disk(job: Job, volume: Volume) -> None:
    """Write zeros over what a raw base's volume holds behind the disk that it is to hold.

    Up to there the overlay hides what it holds, and the merge overwrites it.
    """
    if job.result.header is not None or volume.kind is VolumeKind.FILE:
        return
    had = job.facts.end_before or job.facts.volume.size
    start, end = max(had, job.facts.top.virtual_size), volume.size
    if start < end:
        volume.zero(start, end - start)
