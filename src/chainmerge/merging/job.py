# SPDX-License-Identifier: Apache-2.0
"""A merge that will be done, and what every engine needs before it writes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct, field

from chainmerge.bitmaps.gathering import BitmapFacts
from chainmerge.bitmaps.rules import Fate
from chainmerge.chain.opening import OpenChain, OpenImage
from chainmerge.chain.reading import open_for_writing
from chainmerge.chain.target import Target
from chainmerge.documents.plan import MergePlan
from chainmerge.documents.progress import OnProgress, ProgressEvent, ShouldStop, Stage
from chainmerge.engines.metadata.leaks import reclaim_leaks
from chainmerge.engines.native.survey import MappingNeed
from chainmerge.engines.native.zeroes import ZeroRanges
from chainmerge.errors import Interrupted, Refused
from chainmerge.merging.errors import MergeUnfinished
from chainmerge.options import Access, MergeOptions, Placement
from chainmerge.planning.facts import MergeFacts
from chainmerge.planning.leaks import Leaks
from chainmerge.qcow2.behind_end import old_bytes
from chainmerge.records.identity import Identities, ImageIdentity, identify
from chainmerge.records.remains import Remains
from chainmerge.records.request import RecordedRequest, recorded
from chainmerge.records.saved_bitmaps import (
    SavedBitmap,
    SavedBitmaps,
    forget_saved_bitmaps,
    save_bitmaps,
)
from chainmerge.storage.files import WritablePort
from chainmerge.storage.locks import ImageLock

if TYPE_CHECKING:
    from chainmerge.chain.model import ImageInfo


class Request(Struct, frozen=True):
    """What was requested, and how to talk to the caller."""

    top: Path
    base: Path | None
    access: Access
    options: MergeOptions
    report: OnProgress
    should_stop: ShouldStop
    started: float
    claims: Mapping[str, int]
    """Bytes that other merges which are done together with it take, by the pool they come from."""
    images: tuple[ImageIdentity, ...] = ()
    """The only ones that may be merged, from base up; empty where those between do not matter."""

    def recorded(self, base: Path) -> RecordedRequest:
        """What was requested, as it is recorded, of a merge that turns out to be into *base*."""
        return recorded([self.top], [self.base or base], self.access, self.options)

    def announce(self, stage: Stage) -> None:
        """Report that a stage begins; stop here if the caller wants to."""
        self.stop_if_asked(f"it had not reached stage {stage}")
        self.report(ProgressEvent(stage))

    def announce_waiting(self) -> None:
        """Report that an image is locked by somebody else, and waited for."""
        self.report(ProgressEvent(Stage.WAIT))

    def begin_to_settle(self, result: str) -> None:
        """Report that *result* holds everything; stop here if the caller wants to."""
        self.stop_if_asked(
            f"{result} holds everything, verified; files remain to be given another backing file, "
            "renamed or deleted"
        )
        self.report(ProgressEvent(Stage.SETTLE))

    def stop_if_asked(self, state: str) -> None:
        """Stop here if the caller wants to; *state* says what the disk holds."""
        if self.should_stop():
            raise Interrupted(state)


class Job(Struct, frozen=True):
    """A merge that will be done."""

    request: Request
    target: Target
    facts: MergeFacts
    bitmaps: BitmapFacts
    needs: Mapping[Placement, MappingNeed]
    zeroes: ZeroRanges | None
    leaks: Leaks
    plan: MergePlan
    opened: OpenChain
    locks: tuple[ImageLock, ...]
    remains: Remains
    """What earlier runs had left when it was decided on, under the locks."""
    identities: Identities = field(default_factory=Identities)
    """Of its images."""

    @property
    def base(self) -> ImageInfo:
        return self.target.base

    @property
    def recorded_request(self) -> RecordedRequest:
        """What was requested, as it is recorded."""
        return self.request.recorded(self.base.path)

    @property
    def result(self) -> ImageInfo:
        """The image that is written, and holds everything in the end."""
        return self.facts.result


class Merged(Struct, frozen=True):
    """What a merge has copied, in guest bytes and in seconds, and verified, in sentences."""

    copied: int
    verified: tuple[str, ...]
    copy_seconds: float = 0.0


def wipe_behind_end(base: OpenImage, size_after: int) -> None:
    """Make zeros of what *base* holds behind the end of its disk, before QEMU moves that end.

    Nobody reads it until then, a VM that has base open included, so a kill here changes nothing
    that anybody sees. What cannot be wiped has been refused.

    Raises what opening and writing a file raises.
    """
    if base.image is None:
        return
    places = old_bytes(base.image, base.layer.source, size_after).places
    if not places:
        return
    data_file = base.info.data_file
    with open_for_writing(base.info) if data_file is None else WritablePort(data_file) as port:
        for offset, length in places:
            port.write(offset, bytes(length))
        port.flush()
        port.forget_cached()


def reclaim(job: Job) -> bool:
    """Free what an interrupted run has leaked; the plan counts on it being free.

    What others have leaked stays, unless it was asked for. Returns whether there was anything.
    """
    if not job.leaks.any_freed:
        return False
    with open_for_writing(job.result) as port:
        reclaim_leaks(port, job.leaks.freed)
    return True


@contextlib.contextmanager
def unfinished_where_refused(job: Job) -> Iterator[None]:
    """For what comes after a first change: to be refused means that nothing was changed."""
    try:
        yield
    except Refused as error:
        raise MergeUnfinished(str(job.facts.top.path), error.sentence) from error


@contextlib.contextmanager
def leaks_reclaimed(job: Job) -> Iterator[None]:
    """Reclaim, for the block; where that changed something, nothing in it is refused any more."""
    if not reclaim(job):
        yield
        return
    with unfinished_where_refused(job):
        yield


def bitmaps_to_save(job: Job) -> SavedBitmaps | None:
    """What a rerun has to know of the kept checkpoints; None if the images tell it all.

    That is the bits of those that base has, as they will not be in base for a while. In a
    merge of several levels it is also which ones base did not have: with them stored in
    base and images in between that lack them, the chain looks as if there was a gap.
    """
    spans_levels = len(job.facts.merged_images) > 1
    names = [
        decision.name
        for decision in job.bitmaps.decisions
        if decision.fate is Fate.KEEP and (decision.name in job.bitmaps.base_bits or spans_levels)
    ]
    if not names:
        return None
    overlay = job.opened.images[job.target.base_index + 1]
    return SavedBitmaps(
        identify(job.base.real_path),
        identify(job.target.overlay.real_path),
        tuple(
            SavedBitmap(
                name,
                job.bitmaps.base_bits.get(name),
                overlay.bits(name) if overlay.entry(name) is not None else None,
            )
            for name in names
        ),
        job.recorded_request,
    )


def note_what_base_lacks(job: Job) -> None:
    """Where a rerun could take a name that base gets for one with a gap below it, write it down."""
    if len(job.facts.merged_images) > 1 and job.base.supports_bitmaps:
        saved = bitmaps_to_save(job)
        if saved is not None:
            save_bitmaps(job.base.real_path, saved)


def forget_what_was_noted(job: Job) -> None:
    """Remove what this run saved of base's bitmaps, but not what an earlier one has left."""
    if not job.facts.interrupted:
        forget_saved_bitmaps(job.base.real_path)
