# SPDX-License-Identifier: Apache-2.0
"""A merge up to its first write: everything is examined, locked and decided."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct
from msgspec.structs import replace

from chainmerge.chain.errors import BackingFileMissing, ImageReplaced
from chainmerge.chain.opening import open_target
from chainmerge.chain.surroundings import Look
from chainmerge.chain.target import Target
from chainmerge.documents.merge import MergeReport
from chainmerge.documents.plan import MergePlan
from chainmerge.documents.progress import Stage
from chainmerge.merging.apart import require_apart
from chainmerge.merging.deciding import decided_job, find_same_target, find_target_of
from chainmerge.merging.deleting import require_unused
from chainmerge.merging.execution import execute
from chainmerge.merging.finished import finished_before
from chainmerge.merging.live_remains import finish_pivot, require_clear
from chainmerge.merging.recorded import finish_recorded_merge
from chainmerge.merging.resuming import (
    HoldsEverything,
    ToBeMerged,
    TookEffectInVm,
    find_ending,
    finish_journalled,
    require_removable,
)
from chainmerge.planning.encryption import has_encrypted, require_keys_that_fit
from chainmerge.planning.locking import (
    images_wanted,
    images_written,
    lock_all,
    locks_held,
    read_from_storage,
    refuse_users,
)
from chainmerge.records.identity import identify, may_be_same
from chainmerge.records.merged_record import MergedRecord, load_merged_record
from chainmerge.records.remains import is_anything_left, read_remains
from chainmerge.storage.bystanders import Wanted
from chainmerge.storage.errors import ImageMissing
from chainmerge.storage.limits import allow_open_files
from chainmerge.storage.locks import LockMode
from chainmerge.storage.other_hosts import held_by_this_host
from chainmerge.storage.other_users import last_changes, look_for_others, require_unchanged

if TYPE_CHECKING:
    from chainmerge.errors import ChainmergeError
    from chainmerge.merging.job import Request
    from chainmerge.storage.locks import ImageLock

_TRIES: Final = 5
"""How often a chain may become another one before a merge of it has its locks."""


class Prepared(Struct, frozen=True):
    """A merge that was decided upon, or the rest of an interrupted one.

    Attributes:
        base: The image merged into.
        plan: What is going to be done; None if only the end of it is left.
        claim: Bytes that it takes, by the pool that they come from.
        images: What it wants of which images.
        seen: When these were written last, before they were looked at.
        carry_out: Does it. Raises what :func:`merge` raises, except for Refused.
    """

    base: Path
    plan: MergePlan | None
    claim: Mapping[str, int]
    images: tuple[Wanted, ...]
    seen: Mapping[str, str]
    carry_out: Callable[[], MergeReport]


def prepare(stack: contextlib.ExitStack, requests: Sequence[Request]) -> tuple[Prepared, ...]:
    """Look at everything and decide on everything that some merges do; no image is written to.

    What is locked and opened stays so until *stack* is closed. Where a chain has become another
    one while this waited for a lock, as another merge of it came to its end, all is looked at
    again.

    Raises:
        Refused: they will not be done.
        Interrupted: who asked for them said so.
    """
    for tries_left in reversed(range(_TRIES)):
        with contextlib.ExitStack() as attempt:
            try:
                prepared = _prepare(attempt, requests)
            except _ChangedMeanwhile as error:
                if not tries_left:
                    raise error.reason from error
                continue
            stack.push(attempt.pop_all())
            return prepared
    raise AssertionError("the last try returns or raises")


class _ChangedMeanwhile(Exception):
    """What was found before the images were locked is not what is there now."""

    def __init__(self, reason: ChainmergeError) -> None:
        super().__init__(reason.sentence)
        self.reason = reason


@contextlib.contextmanager
def _changes_noticed() -> Iterator[None]:
    try:
        yield
    except (ImageMissing, ImageReplaced, BackingFileMissing) as error:
        raise _ChangedMeanwhile(error) from error


def _prepare(stack: contextlib.ExitStack, requests: Sequence[Request]) -> tuple[Prepared, ...]:
    """As :func:`prepare`. Raises _ChangedMeanwhile too."""
    look = Look()
    found = [_find(request, look) for request in requests]
    merges = [
        (one, request.options)
        for one, request in zip(found, requests, strict=True)
        if isinstance(one, Target)
    ]
    require_apart(merges)
    allow_open_files(sum(locks_held(target) for target, _ in merges))
    for target, request in zip(found, requests, strict=True):
        if isinstance(target, Target):
            written = images_written(target, request.options)
            stack.enter_context(held_by_this_host(written, request.access))
    locks = [
        _locked(stack, one, request) if isinstance(one, Target) else ()
        for one, request in zip(found, requests, strict=True)
    ]
    # Nobody else can change the chains any more.
    look = Look(look.headers)
    claims: Counter[str] = Counter()
    prepared = []
    for request, one, held in zip(requests, found, locks, strict=True):
        if isinstance(one, Target):
            with _changes_noticed():
                target = find_same_target(one, request, look)
            _require_images(request, target)
            beside = replace(request, claims=dict(claims))
            prepared.append(_prepare_locked(stack, beside, target, held))
        else:
            prepared.append(one)
        claims.update(prepared[-1].claim)
    return tuple(prepared)


def _require_images(request: Request, target: Target) -> None:
    """Raise ImageReplaced where others are to be merged than the caller has decided on."""
    if not request.images:
        return
    found = [identify(image.real_path) for image in target.chain.images[target.base_index :]]
    if len(found) != len(request.images) or not all(map(may_be_same, found, request.images)):
        raise ImageReplaced(str(target.chain.top.path))


def _find(request: Request, look: Look) -> Target | Prepared:
    """The images of a merge; or the rest of it where a record tells that they are merged."""
    record = load_merged_record(request.top)
    if record is not None and finished_before(
        record, request.top, request.base, request.options, request.access.active
    ):
        require_unused(record, request.access, request.options)
        finish_deleting = partial(finish_recorded_merge, request, record)
        return Prepared(record.beside, None, {}, _doomed_of(record), {}, finish_deleting)
    require_clear(request, record)
    request.announce(Stage.LOCK)
    try:
        target = find_target_of(request, look)
    except ImageMissing as error:
        # Another merge of it can have come to its end since the record was read.
        if load_merged_record(request.top) == record:
            raise
        raise _ChangedMeanwhile(error) from error
    if not is_anything_left(target.base.real_path, target.chain.top.real_path):
        return target
    # What an earlier run put on base may turn out to be a child of top, to be locked too.
    read_from_storage(target, request.options, target.relatives.siblings)
    return find_target_of(request)


def _locked(stack: contextlib.ExitStack, target: Target, request: Request) -> tuple[ImageLock, ...]:
    with _changes_noticed():
        seconds, options = request.access.lock_wait, request.options
        locks = tuple(lock_all(stack, target, seconds, options, request.announce_waiting))
        # Asked again: who had the locks until now may have been interrupted. Children of top that
        # an earlier run has put on base are siblings of top now.
        left = is_anything_left(target.base.real_path, target.chain.top.real_path)
        read_from_storage(target, request.options, target.relatives.siblings if left else ())
    return locks


def _prepare_locked(
    stack: contextlib.ExitStack, request: Request, target: Target, locks: tuple[ImageLock, ...]
) -> Prepared:
    base = target.base.real_path
    images = images_wanted(target, request.options)
    seen = last_changes(images)
    # Whoever writes now, what is read from here on would be older than that.
    refuse_users(look_for_others([images]))
    remains = read_remains(base, target.chain.top.real_path)
    opened = stack.enter_context(open_target(target, locks))
    match find_ending(request, target, opened, remains):
        case TookEffectInVm(journal):
            finish = partial(finish_pivot, request, journal, target, opened, locks)
            return Prepared(base, None, {}, images, seen, finish)
        case HoldsEverything(journal):
            require_removable(request, target, journal)
            finish = partial(finish_journalled, request, target, journal, locks)
            return Prepared(base, None, {}, images, seen, finish)
        case ToBeMerged() as ending:
            pass
    request.announce(Stage.PLAN)
    job = decided_job(request, target, opened, locks, remains, ending)
    if has_encrypted(target.chain):
        require_keys_that_fit(target.chain, request.options)
    claim = job.facts.volume.claim(job.plan.space.required, job.plan.space.allocates)
    return Prepared(base, job.plan, claim, images, seen, partial(execute, job))


def _doomed_of(record: MergedRecord) -> tuple[Wanted, ...]:
    return tuple(Wanted(Path(one.path), LockMode.WRITER, dies=True) for one in record.delete)


def require_no_others(prepared: Sequence[Prepared]) -> tuple[tuple[str, ...], ...]:
    """Make sure that nobody uses the images of some merges that are about to begin, or has since.

    Returns:
        The warnings for the report of each.

    Raises:
        ImageInUse: somebody does, or has written to one since they were looked at.
    """
    found = look_for_others([one.images for one in prepared])
    refuse_users(found)
    for one in prepared:
        require_unchanged(one.images, one.seen)
    return tuple(others.warnings for others in found)
