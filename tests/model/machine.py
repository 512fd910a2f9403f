# SPDX-License-Identifier: Apache-2.0
"""Random lives of a disk, for any backend."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from chainmerge.documents.progress import Stage
from tests.model.disk_history import MAX_GRANULARITY, Backend, DiskHistory, Ending, KillPoint
from tests.model.memory import MemoryBackend

NAMES = st.sampled_from(["cp1", "cp2"])
GRANULARITIES = st.sampled_from([1, 2, MAX_GRANULARITY])
STARTS = st.integers(0, 15)
COUNTS = st.integers(1, 3)
# Checkpoints that begin before a snapshot: names and granularities.
BEGINNINGS: list[dict[str, int]] = [{}, {"cp1": 1}, {"cp2": 2}, {"cp1": 4, "cp2": 1}]
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
        past=st.lists(st.tuples(st.sampled_from(BEGINNINGS), STARTS), min_size=1, max_size=4),
    )
    def create_disk(
        self, variety: int, raw_root: bool, past: list[tuple[dict[str, int], int]]
    ) -> None:
        """Start with a few snapshots, so that few steps are needed to get at the traps."""
        backend = self.make_backend(variety)
        self.history = DiskHistory(backend, 2 * MAX_GRANULARITY, raw_root=raw_root)
        for checkpoints, start in past:
            for name, granularity in checkpoints.items():
                self.history.checkpoint(name, granularity)
            self.history.guest_write(start, 1)
            self.history.snapshot()

    def image(self, which: int) -> str:
        return self.history.images[which % len(self.history.images)]

    @rule(name=NAMES, granularity=GRANULARITIES)
    def checkpoint(self, name: str, granularity: int) -> None:
        self.history.checkpoint(name, granularity)

    @rule(start=STARTS, count=COUNTS, zeroes=st.booleans())
    def guest_write(self, start: int, count: int, zeroes: bool) -> None:
        if zeroes:
            self.history.guest_write_zeroes(start, count)
        else:
            self.history.guest_write(start, count)

    @precondition(lambda self: len(self.history.images) < self.max_images)
    @rule(start=STARTS, grow=st.sampled_from([0, 0, 0, 1]))
    def snapshot_and_write(self, start: int, grow: int) -> None:
        self.history.snapshot(grow=grow)
        self.history.guest_write(start, 1)

    @rule(which=ANY, older=st.booleans())
    def start_from_another_image(self, which: int, older: bool) -> None:
        if not older:
            leaves = self.history.leaves()
            self.history.switch_to(leaves[which % len(leaves)])
        elif len(self.history.images) < self.max_images:
            self.history.revert(self.image(which))

    @rule(which=ANY)
    def delete_leaf(self, which: int) -> None:
        self.history.delete_leaf(self.image(which))

    @rule(write=st.none() | st.tuples(STARTS, COUNTS))
    def crash(self, write: tuple[int, int] | None) -> None:
        if write is None:
            self.history.crash()
        else:
            self.history.guest_write_and_crash(*write)

    def occurrences(self) -> list[tuple[str, str]]:
        history = self.history
        return [
            (image, name) for image in history.images for name in history.backend.bitmaps(image)
        ]

    @precondition(lambda self: self.occurrences())
    @rule(which=ANY, remove=st.booleans())
    def meddle(self, which: int, remove: bool) -> None:
        """Somebody removes or disables a bitmap in one image."""
        occurrences = self.occurrences()
        image, name = occurrences[which % len(occurrences)]
        if remove:
            self.history.remove_bitmap(image, name)
        else:
            self.history.disable_bitmap(image, name)

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
        self.meddle(occurrence, remove)
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


class AbandonedMergesMachine(DiskHistoryMachine):
    """Merges that are killed and never run again, or only after other things have happened.

    There is no saying which checkpoints survive that, so it is not for two backends. But
    what passes must be right.
    """

    @precondition(lambda self: self.mergeable())
    @rule(which=ANY, point=KILL_POINTS, top_stays=st.booleans(), start=STARTS)
    def kill_a_merge_and_go_on(
        self, which: int, point: KillPoint, top_stays: bool, start: int
    ) -> None:
        ranges = self.mergeable()
        base, top = ranges[which % len(ranges)]
        ending = self.history.merge_and_kill(base, top, point, top_stays=top_stays)
        if ending is Ending.KILLED:
            self.history.abandon_merge()
            self.history.check()
            self.history.guest_write(start, 1)
