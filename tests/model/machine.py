# SPDX-License-Identifier: Apache-2.0
"""Random lives of a disk, for any backend."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from chainmerge.types import Stage
from tests.model.disk_history import MAX_GRANULARITY, Backend, DiskHistory, Ending, KillPoint
from tests.model.memory import MemoryBackend

NAMES = st.sampled_from(["cp1", "cp2"])
GRANULARITIES = st.sampled_from([1, 2, MAX_GRANULARITY])
STARTS = st.integers(0, 15)
COUNTS = st.integers(1, 3)
# An index into what there is, taken modulo: shrinks well and needs no look at the state.
ANY = st.integers(0, 11)
KILL_POINTS = st.builds(
    KillPoint,
    st.sampled_from([Stage.PRUNE, Stage.COPY, Stage.BITMAPS, Stage.VERIFY, Stage.SETTLE]),
    st.integers(0, 15),
)


class DiskHistoryMachine(RuleBasedStateMachine):
    """Everything that :class:`DiskHistory` knows, in any order.

    For other images than those in memory, override :meth:`make_backend` (and
    ``teardown``), and ``max_images`` where images are expensive.
    """

    max_images = 7

    def make_backend(self, variety: int) -> Backend:
        """Images of the kind ``variety``, for a backend that has more than one."""
        return MemoryBackend()

    history: DiskHistory

    @initialize(
        variety=ANY,
        raw_root=st.sampled_from([False, False, False, True]),
        past=st.lists(st.tuples(st.booleans(), STARTS), max_size=4),
    )
    def create_disk(self, variety: int, raw_root: bool, past: list[tuple[bool, int]]) -> None:
        """Start with a few snapshots, so that few steps are needed to get at the traps."""
        backend = self.make_backend(variety)
        self.history = DiskHistory(backend, 2 * MAX_GRANULARITY, raw_root=raw_root)
        for new_checkpoint, start in past:
            if new_checkpoint:
                self.history.checkpoint("cp1", 1)
            self.history.guest_write(start, 1)
            self.history.snapshot()

    def image(self, which: int) -> str:
        return self.history.images[which % len(self.history.images)]

    @rule(name=NAMES, granularity=GRANULARITIES)
    def checkpoint(self, name: str, granularity: int) -> None:
        self.history.checkpoint(name, granularity)

    @rule(start=STARTS, count=COUNTS)
    def guest_write(self, start: int, count: int) -> None:
        self.history.guest_write(start, count)

    @rule(start=STARTS, count=COUNTS)
    def guest_write_zeroes(self, start: int, count: int) -> None:
        self.history.guest_write_zeroes(start, count)

    @precondition(lambda self: len(self.history.images) < self.max_images)
    @rule(start=STARTS, grow=st.sampled_from([0, 0, 0, 1]))
    def snapshot_and_write(self, start: int, grow: int) -> None:
        self.history.snapshot(grow=grow)
        self.history.guest_write(start, 1)

    @precondition(lambda self: len(self.history.images) < self.max_images)
    @rule(which=ANY)
    def revert(self, which: int) -> None:
        self.history.revert(self.image(which))

    @rule(which=ANY)
    def switch_to_leaf(self, which: int) -> None:
        leaves = self.history.leaves()
        self.history.switch_to(leaves[which % len(leaves)])

    @rule(which=ANY)
    def delete_leaf(self, which: int) -> None:
        self.history.delete_leaf(self.image(which))

    @rule()
    def crash(self) -> None:
        self.history.crash()

    @rule(start=STARTS, count=COUNTS)
    def guest_write_and_crash(self, start: int, count: int) -> None:
        self.history.guest_write_and_crash(start, count)

    def occurrences(self) -> list[tuple[str, str]]:
        history = self.history
        return [
            (image, name) for image in history.images for name in history.backend.bitmaps(image)
        ]

    @precondition(lambda self: self.occurrences())
    @rule(which=ANY)
    def disable_bitmap(self, which: int) -> None:
        occurrences = self.occurrences()
        self.history.disable_bitmap(*occurrences[which % len(occurrences)])

    @precondition(lambda self: self.occurrences())
    @rule(which=ANY)
    def remove_bitmap(self, which: int) -> None:
        occurrences = self.occurrences()
        self.history.remove_bitmap(*occurrences[which % len(occurrences)])

    def mergeable(self) -> list[tuple[str, str]]:
        history = self.history
        return [
            (base, top)
            for top in history.images
            for base in history.chain(top)
            if history.mergeable(base, top)
        ]

    @precondition(lambda self: self.mergeable())
    @rule(which=ANY, top_stays=st.booleans(), give_up_checkpoints=st.booleans())
    def merge(self, which: int, top_stays: bool, give_up_checkpoints: bool) -> None:
        ranges = self.mergeable()
        base, top = ranges[which % len(ranges)]
        self.history.merge(base, top, top_stays=top_stays, give_up_checkpoints=give_up_checkpoints)

    @precondition(lambda self: self.mergeable() and self.occurrences())
    @rule(occurrence=ANY, remove=st.booleans(), which=ANY, top_stays=st.booleans())
    def meddle_and_merge(self, occurrence: int, remove: bool, which: int, top_stays: bool) -> None:
        """Two steps that chance seldom puts side by side, and that the traps are made of."""
        if remove:
            self.remove_bitmap(occurrence)
        else:
            self.disable_bitmap(occurrence)
        self.history.check()
        self.merge(which, top_stays, give_up_checkpoints=True)

    @invariant()
    def images_agree_with_what_happened(self) -> None:
        self.history.check()


class KilledMergesMachine(DiskHistoryMachine):
    """Merges that are killed as well, for backends to which that makes a difference."""

    @precondition(lambda self: self.mergeable() and self.history.unfinished is None)
    @rule(which=ANY, point=KILL_POINTS, top_stays=st.booleans())
    def kill_a_merge(self, which: int, point: KillPoint, top_stays: bool) -> None:
        """The next merge finishes it; there is no other until then."""
        ranges = self.mergeable()
        base, top = ranges[which % len(ranges)]
        self.history.merge_and_kill(base, top, point, top_stays=top_stays)

    @precondition(lambda self: self.mergeable())
    @rule(
        which=ANY,
        points=st.lists(KILL_POINTS, min_size=1, max_size=2),
        top_stays=st.booleans(),
        start=STARTS,
    )
    def kill_a_merge_until_it_is_done(
        self, which: int, points: list[KillPoint], top_stays: bool, start: int
    ) -> None:
        """With the guest going on in between; chance seldom puts all that side by side."""
        ranges = self.mergeable()
        base, top = ranges[which % len(ranges)]
        for point in points:
            ending = self.history.merge_and_kill(base, top, point, top_stays=top_stays)
            if ending is not Ending.KILLED:
                return
            self.history.check()
            self.history.guest_write(start, 1)
            self.history.check()
        self.history.merge(base, top, top_stays=top_stays)
