# SPDX-License-Identifier: Apache-2.0
"""A merge, from the lock to the last deleted file. Reads like the table in docs/design.md."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from chainmerge.bitmaps.sets import final_set, lasting_set
from chainmerge.bitmaps.stored import bitmap_results, verified_before
from chainmerge.chain import open_for_writing
from chainmerge.chain.errors import BackingFileMissing, ImageReplaced
from chainmerge.chain.readability import require_readable
from chainmerge.chain.target import (
    BitmapFacts,
    OpenChain,
    Target,
    find_target,
    gather_bitmaps,
    gather_bitmaps_to_pull,
    measure_guest_bytes,
    movement_of,
    open_chain,
)
from chainmerge.chain.view import first_difference
from chainmerge.documents.merge import (
    REPORT_VERSION,
    Measurement,
    MergeOutcome,
    MergeReport,
    Stage,
)
from chainmerge.engines.metadata import remove_snapshots, replace_bitmaps
from chainmerge.engines.metadata.errors import (
    BackingNameUnfit,
    BitmapSetUnfit,
    HeaderFull,
    NotEnoughSpace,
    RefcountTableFull,
)
from chainmerge.engines.native import MappingNeed, ZeroRanges
from chainmerge.errors import ChainmergeError, Refused
from chainmerge.merging.bitmaps_only import merge_bitmaps
from chainmerge.merging.extending import extended
from chainmerge.merging.hiding import hide, hiding_needed, may_need_hiding
from chainmerge.merging.job import (
    Job,
    OnProgress,
    Request,
    ShouldStop,
    reclaim,
    unfinished_where_refused,
    volume_of,
)
from chainmerge.merging.journal import record_switched
from chainmerge.merging.live_remains import (
    finish_pivot,
    forget_left_behind,
    require_clear,
)
from chainmerge.merging.resuming import (
    HoldsEverything,
    ToBeMerged,
    TookEffectInVm,
    find_ending,
    finish_journalled,
    finish_recorded,
    require_removable,
)
from chainmerge.merging.settling import (
    SettleSteps,
    delete_recorded,
    delete_superseded,
    finished_before,
    give_back,
    not_deleted,
    require_unused,
    settle,
)
from chainmerge.merging.verifying import bitmap_difference
from chainmerge.options import Access, Direction, MergeOptions, Placement
from chainmerge.planning.encryption import (
    encrypted_difference,
    has_encrypted,
    key_obstacles,
    require_keys_that_fit,
)
from chainmerge.planning.errors import ImageDamaged, MergeUnfinished
from chainmerge.planning.evidence import COMPARED_BY_A_PLAN, explained_by, weigh
from chainmerge.planning.internal_snapshots import children_with_larger_snapshots, look_at_snapshots
from chainmerge.planning.leaks import Leaks
from chainmerge.planning.plan import (
    EngineName,
    Finding,
    MergeFacts,
    MergePlan,
    bytes_to_copy,
    chosen_space,
    deleted_images,
    find_refusals,
    going,
    make_plan,
    snapshots_to_remove,
)
from chainmerge.planning.removals import look_at_removals
from chainmerge.planning.space.header import header_obstacle
from chainmerge.planning.space.native import (
    choose_direction,
    choose_engine,
    look_for_zeroes,
)
from chainmerge.planning.space.survey import survey_space
from chainmerge.qcow2.check import check
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.records.changes import data_changed, is_there
from chainmerge.records.disks import forget_entry
from chainmerge.records.errors import BitmapsSetAside, MergedBefore
from chainmerge.records.files import StateDirectoryUnusable
from chainmerge.records.identity import identify, may_be_same, same_image
from chainmerge.records.live_journal import forget_live_journal
from chainmerge.records.merge_journal import JournalState, enter, forget_journal
from chainmerge.records.merged_record import MergedRecord, load_merged_record, note_deleted
from chainmerge.records.remains import Remains, is_anything_left, is_left_over, read_remains
from chainmerge.records.saved_bitmaps import (
    forget_saved_bitmaps,
    load_saved_bitmaps,
    saved_bitmaps_file,
)
from chainmerge.storage.bystanders import Wanted
from chainmerge.storage.errors import (
    CannotGrow,
    ExtensionRefused,
    ImageMissing,
    OpenFilesLimited,
)
from chainmerge.storage.files import FileReadable, WritablePort, read_anew
from chainmerge.storage.limits import allow_open_files
from chainmerge.storage.locks import ImageLock, LockMode, contentions, lock_image
from chainmerge.storage.other_users import (
    OtherUsers,
    last_changes,
    look_for_others,
    require_unchanged,
)
from chainmerge.storage.volumes import VolumeKind

if TYPE_CHECKING:
    from chainmerge.chain import ImageInfo
    from chainmerge.records.saved_bitmaps import SavedBitmaps


_REFUSED_IN_TIME: Final = (
    CannotGrow,
    ExtensionRefused,
    NotEnoughSpace,
    HeaderFull,
    RefcountTableFull,
    BitmapSetUnfit,
    BackingNameUnfit,
    StateDirectoryUnusable,
)
"""What the engines find out before they write, or while what they wrote can be given back."""


_TRIES: Final = 5
"""How often a chain may become another one before a merge of it has its locks."""


def plan(
    top: str | Path,
    base: str | Path | None = None,
    access: Access | None = None,
    options: MergeOptions | None = None,
) -> MergePlan:
    """Say what a merge would do. Nothing is written and nothing stays locked.

    What would refuse the merge is in the plan's ``refusals``; only what keeps the chain from
    being read at all is raised.

    Raises:
        ChainmergeError: the chain cannot be found or read.
    """
    decided = plan_beside(top, base, access or Access(), options or MergeOptions(), {})
    return beside_others([decided])[0]


@dataclass(frozen=True, slots=True)
class Planned:
    """A merge as it would be done if nobody else used the images.

    Attributes:
        plan: What would be done.
        claim: Bytes that it would take, by the pool that they come from.
        images: What it would want of which images.
    """

    plan: MergePlan
    claim: Mapping[str, int]
    images: tuple[Wanted, ...]


def beside_others(planned: Sequence[Planned]) -> tuple[MergePlan, ...]:
    """The plans, with what others that use the images mean for them."""
    found = look_for_others([one.images for one in planned])
    return tuple(
        replace(
            one.plan,
            refusals=(
                *(Finding(error.code, error.sentence, error.advice) for error in others.refusals),
                *one.plan.refusals,
            ),
            warnings=(*one.plan.warnings, *others.warnings),
        )
        for one, others in zip(planned, found, strict=True)
    )


def plan_beside(
    top: str | Path,
    base: str | Path | None,
    access: Access,
    options: MergeOptions,
    claims: Mapping[str, int],
) -> Planned:
    """As :func:`plan`, of a merge that is done together with others; see :func:`beside_others`.

    Args:
        top: as in :func:`plan`, and so are *base*, *access* and *options*.
        base: see there.
        access: see there.
        options: see there.
        claims: bytes that the others take, by the pool that they come from.
    """
    target = find_target(Path(top), Path(base) if base is not None else None, access)
    obstacles = tuple(_obstacles(target, options))
    remains = read_remains(target.base.real_path, target.chain.top.real_path)
    saved, record = remains.usable_saved, remains.record
    with open_chain(target.chain) as opened:
        facts = _gather(target, opened, access, options, saved, _never, claims).facts
        if not explained_by(remains, target):
            moved = bytes_to_copy(facts)
            evidence = weigh(target, opened, moved, _never, COMPARED_BY_A_PLAN)
            facts = replace(facts, evidence=evidence)
        if _was_merged_before(target, facts, record, options) and _base_changed_since(record):
            equal = _holds_content(target, opened, facts, options, _never)
            obstacles += () if equal else (_merged_before(target),)
    decided = make_plan(replace(facts, obstacles=(*obstacles, *facts.obstacles)), options)
    claim = facts.volume.claim(decided.space.required, decided.space.allocates)
    return Planned(decided, claim, images_wanted(target, options))


def measure(
    top: str | Path,
    base: str | Path | None = None,
    access: Access | None = None,
    options: MergeOptions | None = None,
) -> Measurement:
    """How large base must be for a merge, and will be after it.

    Raises:
        ChainmergeError: the chain cannot be found or read.
    """
    access, options = access or Access(), options or MergeOptions()
    target = find_target(Path(top), Path(base) if base is not None else None, access)
    saved = load_saved_bitmaps(target.base.real_path)
    with open_chain(target.chain) as opened:
        facts = _gather(target, opened, access, options, saved, _never, {}).facts
    space = chosen_space(facts, options)
    return Measurement(
        version=REPORT_VERSION,
        base=str(target.base.path),
        top=str(target.chain.top.path),
        required=space.required,
        optimal=space.optimal,
        image_end=space.image_end,
        volume_size=facts.volume.size,
        breakdown=dict(space.breakdown),
    )


def merge(
    top: str | Path,
    base: str | Path | None = None,
    access: Access | None = None,
    options: MergeOptions | None = None,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop | None = None,
) -> MergeReport:
    """Merge *top* into *base* (by default top's backing file), and verify the result.

    A merge that was interrupted, in whatever way, is finished by the same call.

    Args:
        top: the overlay whose data goes down.
        base: the image below it that takes the data; images between are merged too.
        access: how images may be found and reached.
        options: how to merge.
        on_progress: called as the work goes on.
        should_stop: asked as the work goes on; the merge stops soon after it says yes.

    Raises:
        Refused: nothing was changed.
        Interrupted: *should_stop* said yes.
        Failed, OutcomeUnknown: the message says what the disk holds now.
    """
    request = Request(
        top=Path(top),
        base=Path(base) if base is not None else None,
        access=access or Access(),
        options=options or MergeOptions(),
        report=on_progress or (lambda _event: None),
        should_stop=should_stop or (lambda: False),
        started=time.monotonic(),
        claims={},
    )
    with contextlib.ExitStack() as stack:
        prepared = prepare(stack, request)
        (warnings,) = require_no_others([prepared])
        report = prepared.carry_out()
    report = replace(report, warnings=(*report.warnings, *warnings))
    forget_entry(prepared.base)
    return report


@dataclass(frozen=True, slots=True)
class Prepared:
    """A merge that is decided upon, or what an interrupted one has left to do.

    Attributes:
        base: The image merged into.
        plan: What is going to be done; None where only the end of it is left.
        claim: Bytes that it takes, by the pool that they come from.
        images: What it wants of which images.
        seen: When these were written last, before they were looked at.
        carry_out: Does it. Raises what :func:`merge` raises, but for Refused.
    """

    base: Path
    plan: MergePlan | None
    claim: Mapping[str, int]
    images: tuple[Wanted, ...]
    seen: Mapping[str, str]
    carry_out: Callable[[], MergeReport]


def prepare(stack: contextlib.ExitStack, request: Request) -> Prepared:
    """Look at everything and decide on everything that a merge does; no image is written to.

    What is locked and opened stays so until *stack* is closed. Where the chain has become another
    one while this waited for a lock, as another merge of it came to its end, all is looked at anew.

    Raises:
        Refused: it will not be done.
        Interrupted: who asked for it said so.
    """
    for tries_left in reversed(range(_TRIES)):
        with contextlib.ExitStack() as attempt:
            try:
                prepared = _prepare(attempt, request)
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


def _prepare(stack: contextlib.ExitStack, request: Request) -> Prepared:
    """As :func:`prepare`. Raises _ChangedMeanwhile, too."""
    record = load_merged_record(request.top)
    if record is not None and finished_before(
        record, request.top, request.base, request.options, request.access.active
    ):
        require_unused(record, request.access, request.options)
        finish_deleting = partial(_report_finished, request, record)
        return Prepared(Path(record.base), None, {}, _doomed_of(record), {}, finish_deleting)
    require_clear(request, record)
    request.announce(Stage.LOCK)
    try:
        target = _find(request)
    except ImageMissing as error:
        if load_merged_record(request.top) == record:
            raise
        raise _ChangedMeanwhile(error) from error
    if is_anything_left(target.base.real_path, target.chain.top.real_path):
        # What an earlier run put on base may turn out to be a child of top, to be locked, too.
        _read_from_storage(target, request.options)
        target = _find(request)
    allow_open_files(locks_held(target))
    with _changes_noticed():
        locks = tuple(_lock_all(stack, target, request.access.lock_wait, request.options))
        _read_from_storage(target, request.options)
        target = _same_target(target, request)
    base = target.base.real_path
    images = images_wanted(target, request.options)
    seen = last_changes(images)
    # Whoever writes now, what is read from here on would be older than that.
    _refuse_users(look_for_others([images]))
    remains = read_remains(base, target.chain.top.real_path)
    opened = stack.enter_context(open_chain(target.chain, locks))
    match find_ending(request, target, opened, remains):
        case TookEffectInVm(journal):
            finish = partial(finish_pivot, request, journal, target, opened)
            return Prepared(base, None, {}, images, seen, finish)
        case HoldsEverything(journal):
            require_removable(request, target, journal)
            finish = partial(finish_journalled, request, target, journal)
            return Prepared(base, None, {}, images, seen, finish)
        case ToBeMerged() as ending:
            pass
    request.announce(Stage.PLAN)
    job = _decided(request, target, opened, locks, remains, ending)
    if has_encrypted(target.chain):
        require_keys_that_fit(target.chain, request.options)
    claim = job.facts.volume.claim(job.plan.space.required, job.plan.space.allocates)
    return Prepared(base, job.plan, claim, images, seen, partial(_start, job))


def _decided(
    request: Request,
    target: Target,
    opened: OpenChain,
    locks: tuple[ImageLock, ...],
    remains: Remains,
    ending: ToBeMerged,
) -> Job:
    """Look at the locked images, and decide on everything.

    Raises:
        Refused: it will not be done.
    """
    found = _gather_to_merge(target, opened, request, remains, ending)
    if not (explained_by(remains, target) or found.facts.content_merged):
        found = _weighed(found, target, opened, request)
    for refusal in find_refusals(found.facts, request.options):
        raise refusal
    decided = make_plan(found.facts, request.options)
    return Job(
        request,
        target,
        found.facts,
        found.bitmaps,
        found.needs,
        found.zeroes,
        found.leaks,
        decided,
        opened,
        locks,
    )


def _lock_all(
    stack: contextlib.ExitStack, target: Target, wait_seconds: float, options: MergeOptions
) -> Iterator[ImageLock]:
    """Lock the chain from its root up, then the children that will be re-pointed."""
    for image, mode in locks_needed(target, options):
        yield stack.enter_context(lock_image(image.path, mode, wait_seconds))


def _read_from_storage(target: Target, options: MergeOptions) -> None:
    """See what the storage holds of the images that will be written, not what the kernel has.

    After a write that failed the kernel goes on showing what was to be written, until it needs
    the memory. A switch that failed would be taken for one that was done, and top be deleted.
    """
    images = [image for image, mode in locks_needed(target, options) if mode is LockMode.WRITER]
    if is_anything_left(target.base.real_path, target.chain.top.real_path):
        # Children of top that an earlier run has put on base are siblings of top now.
        images += target.relatives.siblings
    for image in images:
        # What cannot be opened for writing is refused with all other obstacles.
        with contextlib.suppress(Refused):
            read_anew(image.real_path)


def locks_needed(target: Target, options: MergeOptions) -> Iterator[tuple[ImageInfo, LockMode]]:
    """All images that a merge has to itself, in the order in which they are locked."""
    last = len(target.chain.images) - 1
    written = set()
    if options.direction != "pull":
        written.add(target.base_index)
        # Top is re-pointed past the images in between.
        if target.base_index < last - 1:
            written.add(last)
        if _may_be_extended(target, options):
            written.add(target.base_index + 1)
    if options.direction == "pull" or (options.direction == "auto" and options.keep_name):
        written.add(last)
    if options.drop_snapshots:
        # Which of them have to go is known only once all are locked.
        above_base = range(target.base_index + 1, last + 1)
        written.update(index for index in above_base if _holds_snapshots(target, index))
    for index, image in enumerate(target.chain.images):
        yield image, LockMode.WRITER if index in written else LockMode.READER
    if options.direction == "pull":
        return
    for child in target.relatives.children:
        yield child, LockMode.WRITER


def _holds_snapshots(target: Target, index: int) -> bool:
    header = target.chain.images[index].header
    return header is not None and header.snapshot_count > 0


def images_wanted(target: Target, options: MergeOptions) -> tuple[Wanted, ...]:
    """What a merge wants of which images: what it locks them as, and which it may delete."""
    deletes = options.delete or options.keep_name
    merged = {image.identity for image in target.chain.images[target.base_index :]}
    return tuple(
        Wanted(image.path, mode, dies=deletes and image.identity in merged)
        for image, mode in locks_needed(target, options)
    )


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
    _refuse_users(found)
    for one in prepared:
        require_unchanged(one.images, one.seen)
    return tuple(others.warnings for others in found)


def _refuse_users(found: Sequence[OtherUsers]) -> None:
    for others in found:
        for refusal in others.refusals:
            raise refusal


def _may_be_extended(target: Target, options: MergeOptions) -> bool:
    """Whether the overlay may have to hide what base shows once its volume is larger."""
    on_volume = target.base.is_block_device or options.volume == "lvm"
    return on_volume and may_need_hiding(target)


def locks_held(target: Target) -> int:
    """How many files a merge has open at least: images are read through their locks."""
    images = target.chain.images
    data_files = sum(image.data_file is not None for image in images)
    return len(images) + data_files + len(target.relatives.children)


def _obstacles(target: Target, options: MergeOptions) -> Iterator[ChainmergeError]:
    """What would keep a merge from getting the images for itself, found without waiting."""
    try:
        allow_open_files(locks_held(target))
    except OpenFilesLimited as error:
        yield error
    locks = locks_needed(target, options)
    yield from contentions((image.path, mode) for image, mode in locks)
    yield from _not_writable(target, options)


def _not_writable(target: Target, options: MergeOptions) -> Iterator[ChainmergeError]:
    for image, mode in locks_needed(target, options):
        if mode is not LockMode.WRITER:
            continue
        try:
            WritablePort(image.path).close()
        except ChainmergeError as error:
            yield error


def _find(request: Request) -> Target:
    return find_target(request.top, request.base, request.access)


def _same_target(before: Target, request: Request) -> Target:
    """Look again, now that nobody else can change the chain any more."""
    target = _find(request)
    for old, new in zip(before.chain.images, target.chain.images, strict=False):
        if old.identity != new.identity:
            raise ImageReplaced(str(new.path))
    if len(before.chain.images) != len(target.chain.images):
        raise ImageReplaced(str(target.chain.top.path))
    known = {child.identity for child in before.relatives.children}
    for child in target.relatives.children:
        if child.identity not in known:
            raise ImageReplaced(str(child.path))
    return target


@dataclass(frozen=True, slots=True)
class _Found:
    """What was found on disk."""

    facts: MergeFacts
    bitmaps: BitmapFacts
    needs: Mapping[Placement, MappingNeed]
    zeroes: ZeroRanges | None
    leaks: Leaks


def _never() -> bool:
    return False


def _gather(
    target: Target,
    opened: OpenChain,
    access: Access,
    options: MergeOptions,
    saved: SavedBitmaps | None,
    should_stop: ShouldStop,
    claims: Mapping[str, int],
) -> _Found:
    require_readable(target, opened)
    top_stays = not (options.delete or options.keep_name)
    volumes = measure_guest_bytes(target, opened)
    way = choose_direction(target, opened, volumes, options)
    if way.direction is Direction.PULL:
        bitmaps = gather_bitmaps_to_pull(target, opened)
    else:
        bitmaps = gather_bitmaps(target, opened, saved, top_stays=top_stays)
    chosen = choose_engine(target, opened, options.engine, way.direction)
    zeroes = None
    if options.detect_zeroes and chosen.engine is EngineName.NATIVE:
        zeroes = look_for_zeroes(target, opened, way.direction, should_stop)
    snapshots = look_at_snapshots(target, opened, way.direction, to_remove=options.drop_snapshots)
    result = opened.images[target.result_index(way.direction)]
    survey = survey_space(
        target,
        opened,
        bitmaps,
        chosen.engine,
        way.direction,
        zeroes,
        snapshots.removals.get(str(result.info.path)),
        options,
    )
    obstacles = (
        way.obstacle,
        chosen.obstacle,
        survey.obstacle,
        *snapshots.obstacles,
        *_bitmaps_set_aside(target, way.direction),
        *(children_with_larger_snapshots(target) if way.direction is Direction.COMMIT else ()),
        _too_many_files(target, chosen.engine),
        *key_obstacles(target.chain, options),
    )
    facts = MergeFacts(
        chain=target.chain,
        base_index=target.base_index,
        relatives=target.relatives,
        decisions=bitmaps.decisions,
        final_bits=bitmaps.final_bits,
        recovered=bitmaps.recovered,
        interrupted=saved is not None,
        result_check=survey.check,
        movement=movement_of(volumes),
        pull_bytes=volumes.pull,
        # An earlier run has made zero clusters of stored zeros, or none where none was needed.
        undefined_bytes=volumes.undefined
        - (volumes.undefined_zeros if options.detect_zeroes else 0),
        merged=None,
        volume=volume_of(result.info, options).facts().beside(claims),
        engine=chosen.engine,
        engine_reason=chosen.reason,
        direction=way.direction,
        pull_obstacle=way.pull_obstacle,
        spaces=survey.spaces,
        obstacles=tuple(one for one in obstacles if one is not None),
        warnings=bitmaps.warnings,
        removals=look_at_removals(target.chain, target.base_index, access, options),
        snapshots=snapshots.views,
        leaks=survey.leaks.facts,
    )
    facts = replace(facts, hiding=hiding_needed(target, opened, way.direction, facts.volume))
    no_room = header_obstacle(result, facts, bitmaps)
    if no_room is not None:
        facts = replace(facts, obstacles=(*facts.obstacles, no_room))
    return _Found(facts, bitmaps, survey.needs, zeroes, survey.leaks)


def _bitmaps_set_aside(target: Target, direction: Direction) -> Iterator[ChainmergeError]:
    """Images other than the base of a commit whose checkpoints an interrupted merge has taken out.

    Those of base are put back, united with the others.
    """
    first = target.base_index + (1 if direction is Direction.COMMIT else 0)
    for image in target.chain.images[first:]:
        file = saved_bitmaps_file(image.real_path)
        if image.header is None or not file.exists():
            continue
        saved = load_saved_bitmaps(image.real_path)
        if saved is None or not may_be_same(saved.base, identify(image.real_path)):
            continue
        # Without the overlay nobody can finish that merge, nor put anything back.
        if not is_there(saved.overlay):
            continue
        names = [bitmap.name for bitmap in saved.bitmaps if bitmap.in_base is not None]
        if names:
            yield BitmapsSetAside(str(image.path), ", ".join(map(repr, names)), str(file))


def _too_many_files(target: Target, engine: EngineName) -> OpenFilesLimited | None:
    """Why the daemon could not copy: it inherits all locks and opens every image itself."""
    if engine is not EngineName.QEMU:
        return None
    try:
        allow_open_files(locks_held(target) + len(target.chain.images))
    except OpenFilesLimited as error:
        return error
    return None


def _gather_to_merge(
    target: Target,
    opened: OpenChain,
    request: Request,
    remains: Remains,
    ending: ToBeMerged,
) -> _Found:
    options, should_stop = request.options, request.should_stop
    saved = remains.usable_saved
    found = _gather(target, opened, request.access, options, saved, should_stop, request.claims)
    facts = found.facts
    commits = facts.direction is Direction.COMMIT
    bitmaps_are_there = commits and _holds_bitmaps(target, opened, found.bitmaps)
    # Who stands on base can be one that is re-pointed already, bitmaps or not.
    before = _was_merged_before(target, facts, remains.record, options)
    worth_comparing = bitmaps_are_there or before or bool(commits and target.relatives.siblings)
    equal = worth_comparing and _holds_content(target, opened, facts, options, should_stop)
    merged = equal and bitmaps_are_there
    damage = () if merged else tuple(_damaged_sources(opened, facts))
    newer = (_merged_before(target),) if before and not equal else ()
    obstacles = (*_not_writable(target, options), *newer, *facts.obstacles, *damage)
    facts = replace(
        facts,
        obstacles=obstacles,
        merged=merged,
        content_merged=equal,
        warnings=(*ending.warnings, *facts.warnings),
        end_before=ending.end_before,
    )
    return replace(found, facts=facts)


def _weighed(found: _Found, target: Target, opened: OpenChain, request: Request) -> _Found:
    moved = bytes_to_copy(found.facts)
    evidence = weigh(target, opened, moved, request.should_stop, None)
    return replace(found, facts=replace(found.facts, evidence=evidence))


def _damaged_sources(opened: OpenChain, facts: MergeFacts) -> Iterator[ChainmergeError]:
    """The images that are merged into another one and whose tables contradict themselves.

    Data and bits that something else was written over would go there as if they were right.
    A plan does not look for this: it takes as long as reading all tables twice.
    """
    merged = {image.identity for image in facts.merged_images}
    for overlay in opened.images:
        if overlay.image is None or overlay.info.identity not in merged:
            continue
        report = check(overlay.image)
        # Stale refcounts are what the dirty bit stands for.
        stale = overlay.image.header.dirty and report.complete
        if report.overlaps or (report.corruptions and not stale):
            first = next(iter(report.messages), "see chainmerge check")
            path = str(overlay.info.path)
            yield ImageDamaged(path, report.corruptions + report.overlaps, first)


def _holds_bitmaps(target: Target, opened: OpenChain, bitmaps: BitmapFacts) -> bool:
    """Whether base has the bitmaps that the merge would give it."""
    image = opened.images[target.base_index].image
    if image is None:
        return True
    return bitmap_difference(image, final_set(bitmaps, target.base.virtual_size)) is None


def _was_merged_before(
    target: Target, facts: MergeFacts, record: MergedRecord | None, options: MergeOptions
) -> bool:
    """Whether all of top went into base, so that what base lacks of it is old data."""
    if facts.direction is Direction.PULL or options.despite_newer_base:
        return False
    return is_left_over(record, target.base.real_path, target.chain.top.real_path)


def _base_changed_since(record: MergedRecord | None) -> bool:
    if record is None or record.left is None:
        return True
    left = record.left
    return left.base_since != data_changed(Path(record.base))


def _merged_before(target: Target) -> MergedBefore:
    return MergedBefore(str(target.chain.top.path), str(target.base.path))


def _holds_content(
    target: Target,
    opened: OpenChain,
    facts: MergeFacts,
    options: MergeOptions,
    should_stop: ShouldStop,
) -> bool:
    """Whether base shows what top shows: an earlier run has copied everything.

    The tables can rule it out in most cases; else content is compared up to the first
    difference.
    """
    base, top = target.base, target.chain.top
    if facts.undefined_bytes or base.virtual_size < top.virtual_size:
        return False
    if facts.result_check is not None and not facts.result_check.sound:
        return False
    if has_encrypted(target.chain):
        return _holds_encrypted_content(target, options, should_stop)
    merged, whole, size = opened.view(0, target.base_index + 1), opened.view(), top.virtual_size
    return first_difference(merged, whole, 0, size, should_stop=should_stop) is None


def _holds_encrypted_content(
    target: Target, options: MergeOptions, should_stop: ShouldStop
) -> bool:
    if any(key_obstacles(target.chain, options)):
        return False
    where = target.base_index
    return encrypted_difference(target.chain, where, options, should_stop) is None


def _start(job: Job) -> MergeReport:
    """Do all that was decided on."""
    removed = snapshots_to_remove(job.facts, job.request.options)
    if not removed:
        return _hide_and_merge(job)
    _remove_snapshots(job, removed)
    with unfinished_where_refused(job), contextlib.ExitStack() as stack:
        return _hide_and_merge(_decided_again(stack, job))


def _hide_and_merge(job: Job) -> MergeReport:
    """Merge and settle, once nothing can show that must not."""
    if job.plan.hides is None:
        return _merge_and_settle(job)
    job.request.announce(Stage.HIDE)
    hide(job)
    with unfinished_where_refused(job), contextlib.ExitStack() as stack:
        return _merge_and_settle(_decided_again(stack, job))


def _decided_again(stack: contextlib.ExitStack, job: Job) -> Job:
    """The same merge once images of the chain were changed before it.

    Tables of theirs lie elsewhere now, clusters that were shared are not, and what moves is
    another.
    """
    target = _same_target(job.target, job.request)
    opened = stack.enter_context(open_chain(target.chain, job.locks))
    remains = read_remains(target.base.real_path, target.chain.top.real_path)
    ending = ToBeMerged((), job.facts.end_before)
    again = _decided(job.request, target, opened, job.locks, remains, ending)
    plan = job.plan
    said = replace(again.plan, snapshots=plan.snapshots, hides=plan.hides, warnings=plan.warnings)
    return replace(again, plan=said)


def _remove_snapshots(job: Job, removed: Sequence[tuple[ImageInfo, frozenset[int]]]) -> None:
    """Take snapshots out of their images, before anything changes what they show."""
    job.request.announce(Stage.SNAPSHOTS)
    # A file's new clusters are reserved one by one.
    grows = job.facts.volume.kind is not VolumeKind.FILE and any(
        image.identity == job.result.identity for image, _ in removed
    )
    with extended(job) if grows else contextlib.nullcontext():
        for number, (image, positions) in enumerate(removed):
            refused = unfinished_where_refused(job) if number else contextlib.nullcontext()
            with refused, open_for_writing(image) as port:
                remove_snapshots(port, positions)


def _merge_and_settle(job: Job) -> MergeReport:
    """Merge and settle; what refuses that when something has changed is no refusal."""
    try:
        merged = _do(job)
    except _REFUSED_IN_TIME:
        raise
    except Refused as error:
        raise MergeUnfinished(str(job.facts.top.path), error.sentence) from error
    try:
        return _settle(job, merged.copied, merged.verified)
    except Refused as error:
        raise MergeUnfinished(str(job.facts.top.path), error.sentence) from error


@dataclass(frozen=True, slots=True)
class _Merged:
    """How many guest bytes were copied, and what was verified, in sentences."""

    copied: int
    verified: tuple[str, ...]


def _do(job: Job) -> _Merged:
    if job.facts.merged:
        reclaim(job)
        return _Merged(0, ("base holds all of top's data and bitmaps already",))
    if job.facts.content_merged and job.base.supports_bitmaps:
        verified = merge_bitmaps(job)
        if verified is not None:
            return _Merged(0, verified)
    return _Merged(*_writer(job.plan.engine)(job))


def _writer(engine: EngineName) -> Callable[[Job], tuple[int, tuple[str, ...]]]:
    """Who merges; only that one is imported, which for QEMU takes as long as a small merge."""
    if engine is EngineName.NATIVE:
        from chainmerge.merging.by_native import merge_natively  # noqa: PLC0415

        return merge_natively
    from chainmerge.merging.by_qemu import merge_by_qemu  # noqa: PLC0415

    return merge_by_qemu


def _settle_pull(job: Job, copied: int, verified: Sequence[str]) -> MergeReport:
    """Delete what top does not need any more; nobody has to be re-pointed."""
    top = job.facts.top
    job.request.begin_to_settle(str(top.path))
    record = load_merged_record(top.real_path)
    deleted: tuple[str, ...] = ()
    if record is not None:
        held = frozenset(image.identity for image in job.facts.merged_images)
        deleted = delete_recorded(record, held)
        note_deleted(top.real_path, record)
    warnings = [*job.plan.warnings, *_give_back(job, top.real_path, top.format)]
    result = top.real_path
    return _report(
        job.request, job.plan, result, top.format, copied, verified, (), deleted, warnings
    )


def _give_back(job: Job, result: Path, result_format: str) -> Iterator[str]:
    shrink_to = job.plan.space.shrink_to
    return give_back(result, result_format, job.request.options, shrink_to)


def _settle(job: Job, copied: int, verified: Sequence[str]) -> MergeReport:
    if job.facts.direction is Direction.PULL:
        return _settle_pull(job, copied, verified)
    request, facts, plan = job.request, job.facts, job.plan
    journal = record_switched(job)
    request.begin_to_settle(str(facts.base.path))
    steps = SettleSteps(
        base=facts.base,
        top=facts.top,
        repoint=plan.repoint,
        doomed=deleted_images(facts, request.options),
        keep_name=plan.rename is not None,
        above=(*facts.relatives.children, facts.top),
        going=going(facts, request.options),
    )
    settled = settle(steps, journal, job.recorded_request)
    warnings = [*plan.warnings, *settled.warnings]
    journal = enter(settled.journal, JournalState.TIDY)
    if settled.top_is_gone:
        warnings += _drop_spent_tombstones(job, steps.result)
    enter(journal, JournalState.GIVE_BACK)
    warnings += _give_back(job, steps.result, job.base.format)
    forget_journal(job.base.real_path)
    forget_live_journal(job.base.real_path)
    return _report(
        request,
        plan,
        steps.result,
        job.base.format,
        copied,
        verified,
        settled.repointed,
        settled.deleted,
        warnings,
    )


def _drop_spent_tombstones(job: Job, result: Path) -> Iterator[str]:
    """Remove the tombstones that only top needed; if that fails they stay, which is harmless."""
    if not job.base.supports_bitmaps:
        return
    lasting = lasting_set(job.bitmaps, job.plan.virtual_size_after)
    try:
        with WritablePort(result) as port:
            if bitmap_difference(Qcow2Image(port), lasting) is not None:
                replace_bitmaps(port, lasting)
    except ChainmergeError as error:
        yield f"tombstones that nothing needs any more are left: {error.sentence}"


def _report_finished(request: Request, record: MergedRecord) -> MergeReport:
    deleted = delete_recorded(record)
    if request.options.delete:
        deleted += delete_superseded(record)
    _forget_bitmaps_saved_for(record)
    forget_left_behind(record)
    warnings = (*not_deleted(record), *finish_recorded(request, record))
    if not any(not_deleted(record)):
        note_deleted(request.top, record)
    images = (record.top, record.base) if record.pulled is None else (record.base, record.top)
    verified = (verified_before(*images),)
    result = Path(record.result)
    return _report(request, None, result, record.result_format, 0, verified, (), deleted, warnings)


def _forget_bitmaps_saved_for(record: MergedRecord) -> None:
    """Remove what that merge saved, and not what another one into the same base has saved."""
    saved = load_saved_bitmaps(Path(record.base))
    if saved is None or not same_image(saved.base, record.result_identity):
        return
    if record.keep_name or any(
        same_image(saved.overlay, doomed.identity) for doomed in record.delete
    ):
        forget_saved_bitmaps(Path(record.base))


def _report(
    request: Request,
    plan_done: MergePlan | None,
    result: Path,
    result_format: str,
    copied: int,
    verified: Sequence[str],
    repointed: Sequence[str],
    deleted: Sequence[str],
    warnings: Sequence[str],
) -> MergeReport:
    already = plan_done is None or plan_done.progress == "merged"
    with FileReadable(result) as readable:
        image = Qcow2Image(readable) if result_format == "qcow2" else None
        return MergeReport(
            version=REPORT_VERSION,
            outcome=MergeOutcome.ALREADY_MERGED if already else MergeOutcome.MERGED,
            plan=plan_done,
            bitmaps=bitmap_results(image) if image is not None else (),
            bytes_copied=copied,
            seconds=time.monotonic() - request.started,
            image_end=check(image).image_end_offset if image is not None else readable.size,
            volume_size=readable.size,
            verified=tuple(verified),
            repointed=tuple(repointed),
            deleted=tuple(deleted),
            renamed=plan_done.rename if plan_done is not None else None,
            warnings=tuple(warnings),
        )
