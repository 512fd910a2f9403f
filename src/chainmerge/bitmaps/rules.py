# SPDX-License-Identifier: Apache-2.0
"""Which persistent dirty bitmaps survive a merge, and why.

A checkpoint is one bitmap name that occurs in several images of a backing chain. A
consumer (libvirt: ``qemuBlockBitmapChainIsValid``) trusts it if it passes the *chain
test*, and then takes the union of all its occurrences for everything that the guest
wrote since. So a merge has two duties: a checkpoint that passed must still cover every write, and
one that failed must not begin to pass. Losing a checkpoint costs one full backup; a false one costs
data.

Everything here is pure: states of bitmaps in, decisions out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum

from msgspec import Struct

from chainmerge.arithmetic.counting import counted


class BitmapState(StrEnum):
    """State of one bitmap name in one closed image."""

    VALID = "valid"  # auto and not in-use: QEMU records writes into it
    DISABLED = "disabled"  # no auto flag: frozen, later writes are missing
    IN_USE = "in-use"  # not stored properly, its content is worthless
    ABSENT = "absent"


class Occurrence(Struct, frozen=True):
    """One bitmap name in one image.

    ``granularity`` is in bytes, 0 for an absent one. ``empty`` is true if the bitmap is
    known to have no dirty bit, None if nobody has looked.
    """

    state: BitmapState
    granularity: int
    empty: bool | None

    @property
    def is_tombstone(self) -> bool:
        """Whether this is the mark that a merge leaves; see :func:`explain_tombstone`."""
        return self.state is BitmapState.DISABLED and self.empty is True


NOT_THERE = Occurrence(BitmapState.ABSENT, 0, None)


class LayerBitmaps(Struct, frozen=True):
    """The bitmaps of one image of a chain; ``image`` is its name in messages.

    ``supports_bitmaps`` is false for raw images and qcow2 version 2.
    """

    image: str
    occurrences: Mapping[str, Occurrence]
    supports_bitmaps: bool

    def occurrence(self, name: str) -> Occurrence:
        return self.occurrences.get(name, NOT_THERE)

    def state(self, name: str) -> BitmapState:
        return self.occurrence(name).state


class Fault(StrEnum):
    """Why a name fails the chain test."""

    ABSENT_FROM_ACTIVE = "absent-from-active"
    NOT_VALID_IN_ACTIVE = "not-valid-in-active"
    BROKEN_BELOW = "broken-below"
    GAP = "gap"


class ChainVerdict(Struct, frozen=True):
    """Outcome of the chain test.

    ``depth`` counts the images of the run in which the name is valid, from the active
    image down. ``culprit`` is the position, counted from the active image (0), of the
    occurrence that spoils the chain; None if the name passes or the culprit is an absence.
    """

    reason: str
    depth: int
    fault: Fault | None = None
    culprit: int | None = None

    @property
    def passes(self) -> bool:
        return self.fault is None


def chain_test(states_from_leaf_down: Sequence[BitmapState]) -> ChainVerdict:
    """Judge one name as the consumers of checkpoints do.

    It passes if it is valid in the active image and in zero or more consecutive images
    below, and absent from all others down to the root.
    """
    states = states_from_leaf_down
    if not states or states[0] is BitmapState.ABSENT:
        return ChainVerdict("absent from the active image", 0, Fault.ABSENT_FROM_ACTIVE)
    if states[0] is not BitmapState.VALID:
        reason = f"{states[0]} in the active image"
        return ChainVerdict(reason, 0, Fault.NOT_VALID_IN_ACTIVE, culprit=0)
    depth = next((i for i, s in enumerate(states) if s is not BitmapState.VALID), len(states))
    culprit = next(
        (i for i in range(depth, len(states)) if states[i] is not BitmapState.ABSENT), None
    )
    if culprit is None:
        return ChainVerdict(f"valid in {counted(depth, 'image')}", depth)
    if culprit == depth:
        reason = f"{states[culprit]} {_levels(culprit)} below the active image"
        return ChainVerdict(reason, depth, Fault.BROKEN_BELOW, culprit)
    reason = (
        f"absent {_levels(depth)} below the active image "
        f"but present again ({states[culprit]}) {_levels(culprit)} below it"
    )
    return ChainVerdict(reason, depth, Fault.GAP, culprit)


def needs_repair(states_from_leaf_down: Sequence[BitmapState]) -> bool:
    """Whether a name is in the way of backups.

    It is in-use in some image, or recording in the active one though it fails the chain test. What
    is merely disabled, or stale below the active image, bothers nobody and may be there on purpose.
    """
    states = states_from_leaf_down
    if BitmapState.IN_USE in states:
        return True
    return BitmapState.VALID in states[:1] and not chain_test(states).passes


class Rule(StrEnum):
    """The rule that decided; the values are part of the stable output."""

    KEPT_EVERYWHERE = "kept-everywhere"
    KEPT_FROM_OVERLAY = "kept-from-overlay"
    GAP_BELOW = "gap-below"
    STALE_IN_BASE = "stale-in-base"
    BROKEN_IN_RUN = "broken-in-run"
    NOT_VALID_IN_TOP = "not-valid-in-top"
    BASE_CANNOT_HOLD = "base-cannot-hold"
    TOMBSTONE_STANDS = "tombstone-stands"
    TOMBSTONE_SPENT = "tombstone-spent"


class Fate(StrEnum):
    """What becomes of a name."""

    KEEP = "keep"  # valid in base afterwards
    PRUNE = "prune"  # in base before, not valid in top: its bits go
    DROP = "drop"  # in the overlays, could not be kept; if base has it, that goes too
    IGNORE = "ignore"  # in overlays only, not valid in top: base need not hear of it


class Decision(Struct, frozen=True):
    """What a merge does with one name, and why.

    ``sources`` are indexes into the chain, lowest first: the images whose bits, united,
    are the result. ``granularity`` (bytes) is the result's, None if nothing is kept.
    ``was_valid`` says whether the name passed the chain test from top before the merge.
    ``states`` go from the root to top.

    A *tombstone* is a disabled, empty bitmap of this name in base. It must be in place
    from the very first change to base's bitmaps, in the same switch that removes the
    old ones. ``tombstone`` asks for one that stands for good;
    ``tombstone_while_top_exists`` (always set with it) for one that is needed at least
    until top cannot be opened any more: in between, top has the name valid, and with
    base's occurrence gone top would pass the chain test on its own bits alone.

    ``unguarded`` means that a tombstone is needed and base cannot hold one: the name must
    be removed from the images above (leaf first), and from top if top stays, or the merge
    makes a false checkpoint.
    """

    name: str
    fate: Fate
    rule: Rule
    tombstone: bool
    tombstone_while_top_exists: bool
    unguarded: bool
    sources: tuple[int, ...]
    granularity: int | None
    was_valid: bool
    states: tuple[BitmapState, ...]
    reason: str

    @property
    def loses_valid_checkpoint(self) -> bool:
        """Whether a checkpoint that can be used now cannot be used after the merge."""
        return self.was_valid and self.fate is not Fate.KEEP


def decide(
    chain: Sequence[LayerBitmaps],
    base_index: int,
    names_above: Collection[str],
    *,
    top_stays: bool,
) -> tuple[Decision, ...]:
    """Decide on every name that occurs in base .. top, sorted by name.

    A name that only occurs in images above top, or below base, needs nothing. If top
    stays and there are images between, top must be re-pointed at base: an image between
    them that lacks a name which base has taken over would look like a gap.

    Args:
        chain: all images from the root to top. Those below base matter: they can hold
            the evidence that a name is broken.
        base_index: index of base in ``chain``.
        names_above: names that occur, in any state, in any image that reads base without
            being part of ``chain``: the images above top, and also what an earlier run
            that was interrupted has already re-pointed from top to base.
        top_stays: whether top is left in place after the merge.

    Raises:
        ValueError: base is not below top.
    """
    if not 0 <= base_index < len(chain) - 1:
        msg = f"base_index {base_index} is not below the top of a chain of {len(chain)} images"
        raise ValueError(msg)
    names = {
        name
        for layer in chain[base_index:]
        for name, occurrence in layer.occurrences.items()
        if occurrence.state is not BitmapState.ABSENT
    }
    above = frozenset(names_above)
    cases = (
        _Case.of(name, chain, base_index, above=name in above, top_stays=top_stays)
        for name in sorted(names)
    )
    return tuple(_decide_one(case) for case in cases)


class _Case(Struct, frozen=True):
    """One name in one chain, with what the rules ask about it."""

    name: str
    chain: Sequence[LayerBitmaps]
    base_index: int
    above: bool
    top_stays: bool
    states: tuple[BitmapState, ...]
    verdict: ChainVerdict

    @classmethod
    def of(
        cls,
        name: str,
        chain: Sequence[LayerBitmaps],
        base_index: int,
        *,
        above: bool,
        top_stays: bool,
    ) -> _Case:
        states = tuple(layer.state(name) for layer in chain)
        return cls(name, chain, base_index, above, top_stays, states, chain_test(states[::-1]))

    @property
    def base(self) -> LayerBitmaps:
        return self.chain[self.base_index]

    @property
    def top(self) -> LayerBitmaps:
        return self.chain[-1]

    @property
    def base_state(self) -> BitmapState:
        return self.states[self.base_index]

    @property
    def top_state(self) -> BitmapState:
        return self.states[-1]

    @property
    def valid_in_top(self) -> bool:
        return self.top_state is BitmapState.VALID

    @property
    def in_base(self) -> bool:
        return self.base_state is not BitmapState.ABSENT

    @property
    def needs_guard(self) -> bool:
        """Whether some image that is left could begin to pass once the merge is done."""
        return self.above or (self.top_stays and self.valid_in_top)

    @property
    def needs_guard_while_top_exists(self) -> bool:
        return self.above or self.valid_in_top

    @property
    def unguarded(self) -> bool:
        if self.base.supports_bitmaps:
            return False
        if self.above:
            return True
        # Top's own bits are the whole truth if nothing between base and top had any, so
        # then top stays right when it sits directly on base.
        spans_more = any(s is not BitmapState.ABSENT for s in self.states[self.base_index : -1])
        return self.needs_guard and spans_more

    def image(self, index: int) -> str:
        return self.chain[index].image

    def from_leaf(self, position: int) -> int:
        """Index in the chain of a position counted from top downwards."""
        return len(self.chain) - 1 - position


def _decide_one(case: _Case) -> Decision:
    if case.verdict.passes and case.base.supports_bitmaps:
        return _keep(case)
    return _lose(case)


def _keep(case: _Case) -> Decision:
    present = [
        index
        for index in range(case.base_index, len(case.chain))
        if case.states[index] is BitmapState.VALID
    ]
    if case.in_base:
        rule = Rule.KEPT_EVERYWHERE
        reason = f"{case.name!r} is valid in {_images(case, present)}: their union is kept"
    else:
        rule = Rule.KEPT_FROM_OVERLAY
        reason = (
            f"{case.name!r} is valid in {_images(case, present)} and not in any image below: "
            f"{case.base.image} takes it over"
        )
    return Decision(
        name=case.name,
        fate=Fate.KEEP,
        rule=rule,
        tombstone=False,
        tombstone_while_top_exists=False,
        unguarded=False,
        sources=tuple(present),
        # The finest, so that no source's bits swell; a finer copy of a coarse bitmap is exact.
        granularity=min(case.chain[i].occurrence(case.name).granularity for i in present),
        was_valid=True,
        states=case.states,
        reason=reason,
    )


def _lose(case: _Case) -> Decision:
    holds = case.base.supports_bitmaps
    tombstone = holds and case.needs_guard
    rule, why = _why_lost(case)
    return Decision(
        name=case.name,
        fate=_fate_of_lost(case),
        rule=rule,
        tombstone=tombstone,
        tombstone_while_top_exists=holds and case.needs_guard_while_top_exists,
        unguarded=case.unguarded,
        sources=(),
        granularity=None,
        was_valid=case.verdict.passes,
        states=case.states,
        reason=why + _guard_clause(case, rule),
    )


def _fate_of_lost(case: _Case) -> Fate:
    if case.valid_in_top:
        return Fate.DROP
    if case.in_base:
        return Fate.PRUNE
    return Fate.DROP if case.above else Fate.IGNORE


def _why_lost(case: _Case) -> tuple[Rule, str]:
    name, base, top = repr(case.name), case.base.image, case.top.image
    if case.verdict.passes:
        return Rule.BASE_CANNOT_HOLD, (
            f"{base} is raw or qcow2 version 2 and cannot hold bitmaps, "
            f"so the valid checkpoint {name} is lost"
        )
    if case.valid_in_top and case.verdict.fault is Fault.GAP:
        return Rule.GAP_BELOW, _gap_sentence(case)
    if case.valid_in_top:
        return Rule.BROKEN_IN_RUN, _broken_sentence(case)
    if case.base.occurrence(case.name).is_tombstone:
        if case.above:
            return Rule.TOMBSTONE_STANDS, f"{name} in {base} is a tombstone and stays one"
        return Rule.TOMBSTONE_SPENT, (
            f"{name} in {base} is a tombstone, and no image above {top} has the name any more"
        )
    where = "absent from" if case.top_state is BitmapState.ABSENT else f"{case.top_state} in"
    if case.in_base:
        return Rule.STALE_IN_BASE, (
            f"stale: {name} is in {base} but {where} {top}, so no chain that reads {top} can use it"
        )
    middle = [i for i, s in enumerate(case.states) if s is not BitmapState.ABSENT]
    middle = [i for i in middle if case.base_index < i < len(case.chain) - 1]
    if middle:
        return Rule.NOT_VALID_IN_TOP, (
            f"{name} is in {_images(case, middle)} but {where} {top}, "
            f"so no chain that reads {top} can use it"
        )
    return Rule.NOT_VALID_IN_TOP, (
        f"{name} is {where} {top}, so no chain that reads {top} can use it"
    )


def _gap_sentence(case: _Case) -> str:
    assert case.verdict.culprit is not None
    gap = case.from_leaf(case.verdict.depth)
    again = case.from_leaf(case.verdict.culprit)
    return (
        f"{case.name!r} is valid in {case.top.image} and present again ({case.states[again]}) "
        f"in {case.image(again)}, but absent from {case.image(gap)} between them: "
        f"what was written while {case.image(gap)} was active is recorded nowhere"
    )


def _broken_sentence(case: _Case) -> str:
    assert case.verdict.culprit is not None
    index = case.from_leaf(case.verdict.culprit)
    image = case.image(index)
    start = f"{case.name!r} is valid in {case.top.image} but"
    if case.chain[index].occurrence(case.name).is_tombstone:
        return f"{start} a tombstone in {image}: the checkpoint was found broken before"
    if case.states[index] is BitmapState.DISABLED:
        return f"{start} disabled in {image}: what was written after that is missing"
    return f"{start} in-use in {image}: it was not stored properly and its bits are worthless"


def _guard_clause(case: _Case, rule: Rule) -> str:
    if case.unguarded:
        places = "the images above" if case.above else case.top.image
        return f"; remove it from {places}, where it would pass for valid but is not"
    if not case.base.supports_bitmaps or not case.needs_guard:
        return ""
    if rule is Rule.TOMBSTONE_STANDS:
        return ", because images above still have the name"
    places = "images above still have the name" if case.above else f"{case.top.image} has the name"
    return f"; a tombstone is left in {case.base.image} because {places}"


def _images(case: _Case, indexes: Sequence[int]) -> str:
    names = [case.image(index) for index in indexes]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _levels(count: int) -> str:
    return counted(count, "level")


def explain_tombstone() -> str:
    """What a tombstone is, for people who meet one in a listing."""
    return (
        "A tombstone is a disabled bitmap without dirty bits that a merge left behind. It marks a "
        "checkpoint that was broken (it had a gap, or was disabled or in-use in some image) while "
        "images above still have its name: without the mark those images would pass for a complete "
        "checkpoint with only their own bits, and an incremental backup made from them would miss "
        "data. It takes only the space of its table in the image, stays until no image above has "
        "the name, and disappears with the next merge after that; 'chainmerge bitmaps repair LEAF' "
        "removes such a checkpoint from the whole chain at once."
    )
