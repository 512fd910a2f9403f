# SPDX-License-Identifier: Apache-2.0
"""From a chain in a running VM to the plan of its merge: the same plan as that of a cold one."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from chainmerge.bitmaps.gathering import names_above
from chainmerge.bitmaps.rules import BitmapState, Decision, Fate, LayerBitmaps, decide
from chainmerge.chain.opening import open_chain
from chainmerge.chain.readability import require_readable
from chainmerge.chain.relatives import Descent, ImageAbove
from chainmerge.documents.plan import EngineName, MergePlan
from chainmerge.errors import ChainmergeError
from chainmerge.live.inspection import layers_of, obstacles, require_no_job, unchangeable
from chainmerge.live.open_files import others_beside, uncertain
from chainmerge.live.pulling import (
    bits_of_pulled,
    decide_to_pull,
    journal_of_pull,
    obstacles_to_pull,
    shapes_of_pulled,
    why_top_stays,
)
from chainmerge.options import Direction, LiveOptions
from chainmerge.planning.choices import require_format_to_write
from chainmerge.planning.encryption import has_encrypted
from chainmerge.planning.facts import MergeFacts, SnapshotViews
from chainmerge.planning.freeing import bytes_occupied, footprints_of
from chainmerge.planning.internal_snapshots import (
    children_with_larger_snapshots,
    look_at_snapshots_live,
)
from chainmerge.planning.leaks import to_note
from chainmerge.planning.movement import measure_guest_bytes, movement_of
from chainmerge.planning.plan import make_plan
from chainmerge.planning.refusals import find_refusals
from chainmerge.planning.removals import Removals, volumes_of
from chainmerge.planning.space.figures import SpaceSurvey
from chainmerge.planning.space.live import survey_for_live
from chainmerge.planning.space.live_pull import survey_pull_for_live
from chainmerge.planning.space.need import BitmapShape, shape_of_kept, shape_of_tombstone
from chainmerge.qcow2.bitmaps import storable_granularity
from chainmerge.qcow2.bits import BitSet, union_all
from chainmerge.qcow2.errors import FormatError
from chainmerge.records.identity import identify
from chainmerge.records.live_journal import VERSION, KeptName, LiveJournal, TombstoneName
from chainmerge.storage.volume_facts import VolumeKind
from chainmerge.storage.volumes import volume_at

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.chain.opening import OpenChain
    from chainmerge.chain.relatives import Relatives
    from chainmerge.live.port import InspectedVm
    from chainmerge.live.target import LiveTarget

NO_CLAIMS: Final[Mapping[str, int]] = MappingProxyType({})
_REASON: Final = "the VM has the images open: its own QEMU copies"
# The guest may have its QEMU write the tables that are being read.
_ATTEMPTS: Final = 5


class LivePlan(Struct, frozen=True):
    """A merge in a running VM as it will be done.

    Attributes:
        plan: The plan for people and programs.
        refusals: Why it will not, the most fundamental first.
        journal: What there is to do in the VM.
        claim: Bytes that it takes at most, by the pool that they come from.
    """

    plan: MergePlan
    refusals: tuple[ChainmergeError, ...]
    journal: LiveJournal
    claim: Mapping[str, int]


def plan_live(
    vm: InspectedVm, live: LiveTarget, options: LiveOptions, claims: Mapping[str, int] = NO_CLAIMS
) -> LivePlan:
    """Look at the images and decide on everything that the merge will do.

    Args:
        vm: the disk of the VM.
        live: the images.
        options: how to merge.
        claims: bytes that merges take that are done together with this one, by the pool that they
            come from.

    Raises:
        LiveJobRunning: images are being changed by somebody's job.
        ChainmergeError: an image cannot be read.
    """
    require_no_job(vm, live)
    vm.let_others_in()
    for _ in range(_ATTEMPTS - 1):
        try:
            return _plan(vm, live, options, claims)
        except FormatError:
            continue
    return _plan(vm, live, options, claims)


def _plan(
    vm: InspectedVm, live: LiveTarget, options: LiveOptions, claims: Mapping[str, int]
) -> LivePlan:
    asked = options.as_merge
    others = others_beside(vm, live, options)
    target = replace(live.target, relatives=_relatives(live))
    live = replace(live, target=target)
    direction = Direction.PULL if options.pulls else Direction.COMMIT
    require_format_to_write(target, direction)
    with open_chain(target.chain) as opened:
        require_readable(target, opened)
        volumes = measure_guest_bytes(target, opened)
        look = _look_at_pull if options.pulls else _look_at_commit
        way = look(vm, live, opened, others.refusals, options)
    result = live.result(options)
    facts = MergeFacts(
        chain=target.chain,
        base_index=target.base_index,
        relatives=target.relatives,
        decisions=way.decisions,
        final_bits=way.final_bits,
        recovered=frozenset(),
        interrupted=False,
        result_check=way.survey.check,
        movement=movement_of(volumes),
        pull_bytes=volumes.pull,
        undefined_bytes=volumes.undefined,
        merged=None,
        volume=volume_at(result.real_path, asked).facts().beside(claims),
        engine=EngineName.QEMU,
        engine_reason=_REASON,
        direction=direction,
        pull_obstacle=_why_not_pulled(vm, live),
        spaces=way.survey.spaces,
        obstacles=way.obstacles,
        warnings=(*_warnings(live, options), *uncertain(vm), *others.warnings),
        snapshots=way.snapshots,
        leaks=way.survey.leaks.facts,
        guest_writes=options.pulls and live.is_active,
        occupied=bytes_occupied(target.chain),
        footprints=footprints_of(target.chain.images[target.base_index :]),
        removals=Removals({}, {}, {}, {}, volumes_of(live.images_deleted(options))),
    )
    plan = _as_it_grows(make_plan(facts, asked))
    if options.pulls:
        journal = journal_of_pull(vm, live, way.decisions, options, facts)
    else:
        journal = _journal(vm, live, way.decisions, options, plan)
    journal = msgspec.structs.replace(journal, leaked_before=to_note(way.survey.leaks.kept))
    claim = facts.volume.claim(plan.space.required, plan.space.allocates)
    return LivePlan(plan, find_refusals(facts, asked), journal, claim)


class _Way(Struct, frozen=True):
    """What was found out for a merge in one of the directions."""

    decisions: tuple[Decision, ...]
    final_bits: Mapping[str, BitSet]
    survey: SpaceSurvey
    snapshots: tuple[SnapshotViews, ...]
    obstacles: tuple[ChainmergeError, ...]


def _look_at_commit(
    vm: InspectedVm,
    live: LiveTarget,
    opened: OpenChain,
    refusals: Sequence[ChainmergeError],
    options: LiveOptions,
) -> _Way:
    target = live.target
    decisions = tuple(_decided(live, layers_of(live, opened), options))
    found = (
        *refusals,
        *obstacles(vm, live, opened),
        *children_with_larger_snapshots(target),
    )
    # Where the VM and the disk do not agree about a bitmap, that is to be said, and not that
    # the one on disk is broken.
    final_bits = {} if found else dict(_known_bits(live, opened, decisions))
    shapes = tuple(_shapes(live, decisions, final_bits))
    survey = survey_for_live(target, opened, frozenset(_stale(live, decisions)), shapes)
    snapshots = look_at_snapshots_live(
        target, opened, Direction.COMMIT, guest_writes=live.is_active
    )
    # The VM is not asked to do anything where it would be for nothing.
    kept = [decision.name for decision in decisions if decision.fate is Fate.KEEP]
    found = found or tuple(unchangeable(vm, live, kept, _names_to_remove(vm, live, decisions)))
    return _Way(decisions, final_bits, survey, snapshots, (*found, *_obstacle_of(survey)))


def _look_at_pull(
    vm: InspectedVm,
    live: LiveTarget,
    opened: OpenChain,
    refusals: Sequence[ChainmergeError],
    options: LiveOptions,  # noqa: ARG001  # as the other way
) -> _Way:
    decisions = decide_to_pull(live, layers_of(live, opened))
    found = (*refusals, *obstacles_to_pull(vm, live, opened, decisions))
    final_bits = {} if found else bits_of_pulled(live, opened, decisions)
    shapes = tuple(shapes_of_pulled(live, decisions, final_bits))
    survey = survey_pull_for_live(live.target, opened, shapes, guest_writes=live.is_active)
    snapshots = look_at_snapshots_live(
        live.target, opened, Direction.PULL, guest_writes=live.is_active
    )
    found = found or tuple(why_top_stays(vm, live, decisions))
    return _Way(decisions, final_bits, survey, snapshots, (*found, *_obstacle_of(survey)))


def _obstacle_of(survey: SpaceSurvey) -> tuple[ChainmergeError, ...]:
    return () if survey.obstacle is None else (survey.obstacle,)


def _why_not_pulled(vm: InspectedVm, live: LiveTarget) -> str | None:
    if live.is_active or vm.pulls_into_middle:
        return None
    return "libvirt pulls into the active image alone"


def _as_it_grows(plan: MergePlan) -> MergePlan:
    """Files are not extended beforehand: the VM's QEMU makes them longer as it writes."""
    if plan.space.kind != VolumeKind.FILE:
        return plan
    return replace(plan, space=replace(plan.space, grow_to=None))


def _relatives(live: LiveTarget) -> Relatives:
    """What was found on disk, and what stands on top in the VM, wherever it lies."""
    found = live.target.relatives
    above = []
    way: Descent | None = None
    for image in live.above:
        above.append(ImageAbove(image, way))
        way = Descent(image.path, way)
    in_vm = {image.identity for image in live.above}
    others = tuple(one for one in found.above if one.image.identity not in in_vm)
    children = tuple(child for child in found.children if child.identity not in in_vm)
    leaf = live.above[-1] if live.above else live.target.chain.top
    return replace(
        found,
        children=(*live.above[:1], *children),
        above=(*above, *others),
        # The VM says what it writes to.
        searched=replace(found.searched, active=str(leaf.path)),
    )


def _decided(
    live: LiveTarget, layers: Sequence[LayerBitmaps], options: LiveOptions
) -> Iterator[Decision]:
    in_vm = {bitmap.name for node in live.nodes_above for bitmap in node.bitmaps}
    above = names_above(live.target) | in_vm
    base = layers[live.target.base_index]
    size = max(live.base.virtual_size, live.top.virtual_size)
    for decision in decide(layers, live.target.base_index, above, top_stays=not options.delete):
        if decision.granularity is None:
            yield decision
            continue
        # QEMU does not change the granularity of a bitmap, and base's has to stay throughout.
        has = base.occurrence(decision.name)
        granularity = has.granularity or storable_granularity(size, decision.granularity)
        yield replace(decision, granularity=granularity)


def _known_bits(
    live: LiveTarget, opened: OpenChain, decisions: Sequence[Decision]
) -> Iterator[tuple[str, BitSet]]:
    """The bits that kept bitmaps will have, where nobody writes to any of the images."""
    if live.is_active:
        return
    size = max(live.base.virtual_size, live.top.virtual_size)
    for decision in decisions:
        if decision.granularity is not None:
            sources = (opened.images[index].bits(decision.name) for index in decision.sources)
            yield decision.name, union_all(sources, size, decision.granularity)


def _stale(live: LiveTarget, decisions: Sequence[Decision]) -> Iterator[str]:
    """The names that go from base and leave nothing behind."""
    for decision in decisions:
        if decision.fate is Fate.KEEP or decision.tombstone_while_top_exists:
            continue
        if live.base.bitmap(decision.name) is not None:
            yield decision.name


def _names_to_remove(vm: InspectedVm, live: LiveTarget, decisions: Sequence[Decision]) -> list[str]:
    """The names that go before anything is copied."""
    if vm.leaves_tombstones:
        return list(_stale(live, decisions))
    # libvirt (9.0) unites what an active image has in a base that lacks it, also where the
    # checkpoint has a gap: base would be given what passes for a complete one.
    return [
        decision.name
        for decision in decisions
        if decision.fate is not Fate.KEEP and (live.is_active or decision.fate is not Fate.IGNORE)
    ]


def _shapes(
    live: LiveTarget, decisions: Sequence[Decision], known: dict[str, BitSet]
) -> Iterator[BitmapShape]:
    """What base's bitmaps will take at most when they are stored."""
    if not live.target.base.supports_bitmaps:
        return
    header = live.target.base.header
    assert header is not None
    size = max(live.base.virtual_size, live.top.virtual_size)
    for decision in decisions:
        if decision.fate is Fate.KEEP:
            assert decision.granularity is not None
            bits = known.get(decision.name)
            yield shape_of_kept(
                decision.name, decision.granularity, bits, size, header.cluster_size
            )
        elif decision.tombstone_while_top_exists:
            yield shape_of_tombstone(decision.name, live.granularity_of(decision.name))


def _warnings(live: LiveTarget, options: LiveOptions) -> Iterator[str]:
    for node, image in zip(live.merged, live.merged_images, strict=True):
        passing = [bitmap.name for bitmap in node.bitmaps if not bitmap.persistent]
        if passing and live.is_active and node == live.top and not options.pulls:
            names = ", ".join(map(repr, passing))
            yield (
                f"bitmaps of {image.path} that are not persistent are lost in the merge: {names}"
            )
    if live.is_active:
        yield (
            "the guest goes on writing: the figures count only what is on disk now, and "
            f"{'top' if options.pulls else 'base'} may grow further"
        )
    if has_encrypted(live.target.chain):
        yield "images are encrypted, with keys that only the VM has: content will not be compared"


def _journal(
    vm: InspectedVm,
    live: LiveTarget,
    decisions: Sequence[Decision],
    options: LiveOptions,
    plan: MergePlan,
) -> LiveJournal:
    first = live.target.base_index + 1
    holds = live.target.base.supports_bitmaps
    base_states = {d.name: d.states[live.target.base_index] for d in decisions}
    above = live.above[0] if live.above else None
    return LiveJournal(
        version=VERSION,
        address=list(vm.address),
        job=live.job_id(options),
        base=identify(live.target.base.real_path),
        overlays=[identify(image.real_path) for image in live.merged_images],
        above=None if above is None else identify(above.real_path),
        backing_name=None if above is None else _new_name(plan, str(above.path)),
        kept=[
            KeptName(
                name=decision.name,
                granularity=decision.granularity,
                in_base=base_states[decision.name] is BitmapState.VALID,
                sources=[index - first for index in decision.sources if index >= first],
            )
            for decision in decisions
            if decision.granularity is not None
        ],
        stale=_names_to_remove(vm, live, decisions) if holds else [],
        tombstones=[
            TombstoneName(
                name=decision.name,
                granularity=live.granularity_of(decision.name),
                in_base=live.base.bitmap(decision.name) is not None,
            )
            for decision in decisions
            if decision.tombstone_while_top_exists and holds and vm.leaves_tombstones
        ],
        delete=options.delete,
        full_verify=options.verify == "full" and not has_encrypted(live.target.chain),
    )


def _new_name(plan: MergePlan, child: str) -> str:
    """How the header of the image on top is to name base."""
    names = (repoint.new_backing for repoint in plan.repoint if repoint.child == child)
    return next(names, plan.base)
