# SPDX-License-Identifier: Apache-2.0
"""A merge, from the lock to the last deleted file. Reads like the table in docs/design.md."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from chainmerge.bitmap_sets import final_set, lasting_set, stand_ins
from chainmerge.chain.errors import ImageReplaced
from chainmerge.checkpoints import Fate
from chainmerge.engines import qemu
from chainmerge.engines.metadata import reclaim_leaks, replace_bitmaps
from chainmerge.errors import ChainmergeError, Interrupted
from chainmerge.inspection import (
    BitmapFacts,
    OpenChain,
    Target,
    find_target,
    gather_bitmaps,
    load_saved,
    measure_guest_bytes,
    movement_of,
    open_chain,
)
from chainmerge.journal import (
    MergedRecord,
    SavedBitmap,
    SavedBitmaps,
    forget_saved_bitmaps,
    identify,
    load_merged_record,
    load_saved_bitmaps,
    same_image,
    save_bitmaps,
)
from chainmerge.options import Access, MergeOptions
from chainmerge.plan_errors import ImageDamaged
from chainmerge.planning import MergeFacts, MergePlan, bytes_to_copy, find_refusals, make_plan
from chainmerge.qcow2.check import check
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.readability import require_readable
from chainmerge.results import bitmap_results
from chainmerge.settle import (
    delete_recorded,
    finished_before,
    record_intent,
    rename_base,
    repoint,
)
from chainmerge.space_facts import survey_space
from chainmerge.storage.errors import OpenFilesLimited
from chainmerge.storage.files import FileReadable, WritablePort
from chainmerge.storage.limits import allow_open_files
from chainmerge.storage.locks import ImageLock, LockMode, contentions, lock_image
from chainmerge.storage.volumes import FileVolume, Volume, open_lvm_volume, open_volume
from chainmerge.types import (
    REPORT_VERSION,
    Measurement,
    MergeOutcome,
    MergeReport,
    ProgressEvent,
    Stage,
)
from chainmerge.verify import bitmap_difference, verify_bitmaps, verify_content, verify_metadata
from chainmerge.view import first_difference

if TYPE_CHECKING:
    from chainmerge.chain import ImageInfo

OnProgress = Callable[[ProgressEvent], None]
ShouldStop = Callable[[], bool]


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
    access, options = access or Access(), options or MergeOptions()
    target = find_target(Path(top), Path(base) if base is not None else None, access)
    obstacles = tuple(_obstacles(target))
    with open_chain(target.chain) as opened:
        facts = _gather(target, opened, options)
    return make_plan(replace(facts, obstacles=(*obstacles, *facts.obstacles)), options)


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
    with open_chain(target.chain) as opened:
        facts = _gather(target, opened, options)
    return Measurement(
        version=REPORT_VERSION,
        base=str(target.base.path),
        top=str(target.chain.top.path),
        required=facts.space.required,
        optimal=facts.space.optimal,
        image_end=facts.space.image_end,
        volume_size=facts.volume.size,
        breakdown=dict(facts.space.breakdown),
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
    request = _Request(
        top=Path(top),
        base=Path(base) if base is not None else None,
        access=access or Access(),
        options=options or MergeOptions(),
        report=on_progress or (lambda _event: None),
        should_stop=should_stop or (lambda: False),
        started=time.monotonic(),
    )
    record = load_merged_record(request.top)
    if record is not None and finished_before(record, request.top, request.base):
        return _report_finished(request, record)
    request.announce(Stage.LOCK)
    target = find_target(request.top, request.base, request.access)
    allow_open_files(_files_open_at_once(target))
    with contextlib.ExitStack() as stack:
        locks = tuple(_lock_all(stack, target, request.access.lock_wait))
        target = _same_target(target, request)
        with open_chain(target.chain, locks) as opened:
            request.announce(Stage.PLAN)
            facts, bitmaps = _gather_to_merge(target, opened, request)
            for refusal in find_refusals(facts, request.options):
                raise refusal
            job = _Job(request, target, facts, bitmaps, make_plan(facts, request.options), locks)
            return _run(job)


@dataclass(frozen=True, slots=True)
class _Request:
    """What was asked for, and how to talk to who asked."""

    top: Path
    base: Path | None
    access: Access
    options: MergeOptions
    report: OnProgress
    should_stop: ShouldStop
    started: float

    def announce(self, stage: Stage) -> None:
        """Report that a stage begins; stop here if the caller wants to."""
        if self.should_stop():
            raise Interrupted(f"it had not come to stage {stage}")
        self.report(ProgressEvent(stage))


@dataclass(frozen=True, slots=True)
class _Job:
    """A merge that will be done."""

    request: _Request
    target: Target
    facts: MergeFacts
    bitmaps: BitmapFacts
    plan: MergePlan
    locks: tuple[ImageLock, ...]

    @property
    def base(self) -> ImageInfo:
        return self.target.base


def _lock_all(
    stack: contextlib.ExitStack, target: Target, wait_seconds: float
) -> Iterator[ImageLock]:
    """Lock the chain from its root up, then the children that will be re-pointed."""
    for image, mode in _locks_needed(target):
        yield stack.enter_context(lock_image(image.path, mode, wait_seconds))


def _locks_needed(target: Target) -> Iterator[tuple[ImageInfo, LockMode]]:
    spans_levels = target.base_index < len(target.chain.images) - 2
    last = len(target.chain.images) - 1
    for index, image in enumerate(target.chain.images):
        # Top is written to if it is to be re-pointed past the images in between.
        written = index == target.base_index or (spans_levels and index == last)
        yield image, LockMode.WRITER if written else LockMode.READER
    for child in target.relatives.children:
        yield child, LockMode.WRITER


def _files_open_at_once(target: Target) -> int:
    """The most that a process of the merge has open: the daemon has all locks and all images."""
    images = target.chain.images
    locks = len(images) + len(target.relatives.children)
    return locks + len(images) + sum(image.data_file is not None for image in images)


def _obstacles(target: Target) -> Iterator[ChainmergeError]:
    """What would keep a merge from getting the images for itself, found without waiting."""
    try:
        allow_open_files(_files_open_at_once(target))
    except OpenFilesLimited as error:
        yield error
    yield from contentions((image.path, mode) for image, mode in _locks_needed(target))
    yield from _not_writable(target)


def _not_writable(target: Target) -> Iterator[ChainmergeError]:
    for image, mode in _locks_needed(target):
        if mode is not LockMode.WRITER:
            continue
        try:
            WritablePort(image.path).close()
        except ChainmergeError as error:
            yield error


def _same_target(before: Target, request: _Request) -> Target:
    """Look again, now that nobody else can change the chain any more."""
    target = find_target(request.top, request.base, request.access)
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


def _gather(target: Target, opened: OpenChain, options: MergeOptions) -> MergeFacts:
    return _gather_with_bitmaps(target, opened, options)[0]


def _gather_with_bitmaps(
    target: Target, opened: OpenChain, options: MergeOptions
) -> tuple[MergeFacts, BitmapFacts]:
    require_readable(target, opened)
    saved = load_saved(target)
    top_stays = not (options.delete or options.keep_name)
    bitmaps = gather_bitmaps(target, opened, saved, top_stays=top_stays)
    volumes = measure_guest_bytes(target, opened)
    survey = survey_space(target, opened, bitmaps)
    facts = MergeFacts(
        chain=target.chain,
        base_index=target.base_index,
        relatives=target.relatives,
        decisions=bitmaps.decisions,
        final_bits=bitmaps.final_bits,
        recovered=bitmaps.recovered,
        interrupted=saved is not None,
        base_check=survey.check,
        movement=movement_of(volumes, survey.new_clusters, survey.new_l2_tables),
        pull_bytes=volumes.pull,
        undefined_bytes=volumes.undefined,
        merged=None,
        volume=_volume(target.base, options).facts(),
        space=survey.facts,
        obstacles=(survey.obstacle,) if survey.obstacle is not None else (),
        warnings=bitmaps.warnings,
    )
    return facts, bitmaps


def _gather_to_merge(
    target: Target, opened: OpenChain, request: _Request
) -> tuple[MergeFacts, BitmapFacts]:
    facts, bitmaps = _gather_with_bitmaps(target, opened, request.options)
    merged = _is_merged(target, opened, facts, bitmaps, request)
    damage = () if merged else tuple(_damaged_overlays(target, opened))
    obstacles = (*_not_writable(target), *facts.obstacles, *damage)
    return replace(facts, obstacles=obstacles, merged=merged), bitmaps


def _damaged_overlays(target: Target, opened: OpenChain) -> Iterator[ChainmergeError]:
    """The images above base whose tables contradict themselves.

    Data and bits that something else was written over would go down into base as if they
    were right. A plan does not look for this: it takes as long as reading all tables twice.
    """
    for overlay in opened.images[target.base_index + 1 :]:
        if overlay.image is None:
            continue
        report = check(overlay.image)
        # Stale refcounts are what the dirty bit stands for.
        stale = overlay.image.header.dirty and report.complete
        if report.overlaps or (report.corruptions and not stale):
            first = next(iter(report.messages), "see chainmerge check")
            path = str(overlay.info.path)
            yield ImageDamaged(path, report.corruptions + report.overlaps, first)


def _is_merged(
    target: Target,
    opened: OpenChain,
    facts: MergeFacts,
    bitmaps: BitmapFacts,
    request: _Request,
) -> bool:
    """Whether base is what the merge would make it: an earlier run came to its end.

    The tables can rule it out in most cases; else content is compared up to the first
    difference.
    """
    base, top = target.base, target.chain.top
    if facts.undefined_bytes or base.virtual_size < top.virtual_size:
        return False
    if facts.base_check is not None and not facts.base_check.sound:
        return False
    image = opened.images[target.base_index].image
    if image is not None and bitmap_difference(image, final_set(bitmaps, base.virtual_size)):
        return False
    difference = first_difference(
        opened.view(0, target.base_index + 1),
        opened.view(),
        0,
        top.virtual_size,
        should_stop=request.should_stop,
    )
    return difference is None


def _run(job: _Job) -> MergeReport:
    if job.facts.merged:
        _reclaim(job)
        return _settle(job, 0, ("base holds all of top's data and bitmaps already",))
    with _extended(job):
        _reclaim(job)
        _put_bitmaps_aside(job)
        copied = _copy(job)
        _store_bitmaps(job)
    return _settle(job, copied, tuple(_verify(job)))


def _reclaim(job: _Job) -> None:
    """Free what an interrupted run has leaked; the plan counts on it being free."""
    report = job.facts.base_check
    if report is not None and (report.leaks or report.hidden_leaks):
        with WritablePort(job.base.real_path) as port:
            reclaim_leaks(port)


def _put_bitmaps_aside(job: _Job) -> None:
    """Take base's bitmaps out of QEMU's reach: stale ones for good, kept ones until the end."""
    if not job.base.supports_bitmaps:
        return
    job.request.announce(Stage.PRUNE)
    saved = _bitmaps_to_save(job)
    if saved is not None:
        save_bitmaps(job.base.real_path, saved)
    with WritablePort(job.base.real_path) as port:
        between = stand_ins(job.bitmaps, job.base.virtual_size)
        if bitmap_difference(Qcow2Image(port), between) is None:
            return
        replace_bitmaps(port, between)
        if between:
            # Once more, now that the old set's clusters are free: low, so that QEMU finds
            # what is left of the volume in one piece.
            replace_bitmaps(port, between)


def _bitmaps_to_save(job: _Job) -> SavedBitmaps | None:
    """What a rerun has to know of the kept checkpoints; None where the images tell it all.

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
    with open_chain(job.target.chain, job.locks) as opened:
        overlay = opened.images[job.target.base_index + 1]
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
        )


def _volume(base: ImageInfo, options: MergeOptions) -> Volume:
    match options.volume:
        case "lvm":
            return open_lvm_volume(base.real_path)
        case "file":
            return FileVolume(str(base.real_path), options.size_limit)
        case _:
            return open_volume(base.real_path, options.size_limit)


@contextlib.contextmanager
def _extended(job: _Job) -> Iterator[None]:
    """Have the space for all of the merge; what was reserved and not used goes back."""
    if job.plan.space.grow_to is None:
        yield
        return
    job.request.announce(Stage.EXTEND)
    volume = _volume(job.base, job.request.options)
    volume.grow_to(job.plan.space.required)
    volume.make_growth_durable()
    try:
        yield
    finally:
        with contextlib.suppress(ChainmergeError):
            volume.release_reservation()


def _copy(job: _Job) -> int:
    """Copy guest data into base; returns how many bytes that was."""
    grows = job.facts.top.virtual_size > job.base.virtual_size
    total = bytes_to_copy(job.facts)
    if total == 0 and not grows:
        return 0
    job.request.announce(Stage.COPY)

    def on_progress(progress: qemu.CopyProgress) -> None:
        job.request.report(ProgressEvent(Stage.COPY, progress.done, progress.total))

    qemu.commit(
        [_image_spec(image) for image in job.target.chain.images],
        job.target.base_index,
        [lock.share_with_child() for lock in job.locks],
        on_progress,
        job.request.should_stop,
        bandwidth=job.request.options.bandwidth,
    )
    with WritablePort(job.base.real_path) as port:
        port.flush()
    return total


def _image_spec(image: ImageInfo) -> qemu.ImageSpec:
    return qemu.ImageSpec(
        path=str(image.real_path),
        format=image.format,
        is_block_device=image.is_block_device,
        data_file=str(image.data_file) if image.data_file else None,
    )


def _store_bitmaps(job: _Job) -> None:
    if job.base.supports_bitmaps:
        job.request.report(ProgressEvent(Stage.BITMAPS))
        with WritablePort(job.base.real_path) as port:
            final = final_set(job.bitmaps, job.plan.virtual_size_after)
            if bitmap_difference(Qcow2Image(port), final) is not None:
                replace_bitmaps(port, final)


def _verify(job: _Job) -> Iterator[str]:
    """Read back what was written, from tables parsed anew."""
    job.request.announce(Stage.VERIFY)
    target = find_target(job.request.top, job.request.base, job.request.access)
    with open_chain(target.chain, job.locks) as opened:
        image = opened.images[target.base_index].image
        if image is not None:
            yield verify_metadata(image)
        if image is not None and job.base.supports_bitmaps:
            final = final_set(job.bitmaps, job.plan.virtual_size_after)
            yield verify_bitmaps(image, final)
        if job.request.options.verify == "full":
            size = opened.view().virtual_size
            yield verify_content(
                str(target.base.path),
                opened.view(0, target.base_index + 1),
                opened.view(),
                lambda done: job.request.report(ProgressEvent(Stage.VERIFY, done, size)),
                job.request.should_stop,
            )


def _settle(job: _Job, copied: int, verified: Sequence[str]) -> MergeReport:
    request, facts = job.request, job.facts
    request.announce(Stage.SETTLE)
    repointed = repoint(job.plan.repoint)
    record = record_intent(facts, job.plan)
    if job.plan.rename is not None:
        rename_base(facts)
    deleted = delete_recorded(record) if record is not None else ()
    # Not before: as long as top stands on images that lack what base has now, a rerun needs
    # to be told that this is no gap.
    forget_saved_bitmaps(job.base.real_path)
    result = facts.top.real_path if job.plan.rename else job.base.real_path
    warnings = list(job.plan.warnings)
    if record is not None:
        warnings += _drop_spent_tombstones(job, result)
    warnings += _give_back(job, result)
    return _report(
        request, job.plan, result, job.base.format, copied, verified, repointed, deleted, warnings
    )


def _drop_spent_tombstones(job: _Job, result: Path) -> Iterator[str]:
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


def _give_back(job: _Job, result: Path) -> Iterator[str]:
    """Shrink the volume and discard what is free, as asked; a failure is no reason to fail."""
    options = job.request.options
    volume = _volume(replace(job.base, real_path=result), options)
    with FileReadable(result) as readable:
        if job.base.header is None:
            return
        end = check(Qcow2Image(readable)).image_end_offset
    try:
        if options.shrink:
            volume.shrink_to(end)
        if options.discard and volume.size > end:
            volume.discard(end, volume.size - end)
    except ChainmergeError as error:
        yield f"{error.sentence} (the merge itself is done)"


def _report_finished(request: _Request, record: MergedRecord) -> MergeReport:
    deleted = delete_recorded(record)
    _forget_bitmaps_saved_for(record)
    verified = ("an earlier run merged and verified it",)
    result = Path(record.result)
    return _report(request, None, result, record.result_format, 0, verified, (), deleted, ())


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
    request: _Request,
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
