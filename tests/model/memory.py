# SPDX-License-Identifier: Apache-2.0
"""Images in memory: the rules for bitmaps alone, thousands of histories a minute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from msgspec import Struct, field
from msgspec.structs import replace

from chainmerge.bitmaps import rules as checkpoints
from chainmerge.bitmaps.rules import BitmapState, Decision, Fate, LayerBitmaps, Occurrence
from tests.model.disk_history import Ending, KillPoint, MergeRequest, StoredBitmap

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

TOMBSTONE = StoredBitmap(BitmapState.DISABLED, 1, frozenset())


class Decide(Protocol):
    """The signature of :func:`chainmerge.bitmaps.rules.decide`."""

    def __call__(
        self,
        chain: Sequence[LayerBitmaps],
        base_index: int,
        names_above: Collection[str],
        *,
        top_stays: bool,
    ) -> tuple[Decision, ...]: ...


class _Image(Struct):
    backing: str | None
    size: int
    holds_bitmaps: bool
    data: dict[int, int] = field(default_factory=dict)
    bitmaps: dict[str, StoredBitmap] = field(default_factory=dict)


class MemoryBackend:
    """A :class:`tests.model.disk_history.Backend` that merges as ``decide`` says."""

    def __init__(self, decide: Decide = checkpoints.decide) -> None:
        self._decide = decide
        self._images: dict[str, _Image] = {}

    def create_root(self, image: str, size: int, *, holds_bitmaps: bool) -> None:
        self._images[image] = _Image(None, size, holds_bitmaps)

    def create_overlay(self, image: str, backing: str, size: int) -> None:
        self._images[image] = _Image(backing, size, holds_bitmaps=True)

    def delete(self, image: str) -> None:
        del self._images[image]

    def write(self, image: str, start: int, count: int, value: int) -> None:
        target = self._images[image]
        blocks = range(start, start + count)
        target.data.update(dict.fromkeys(blocks, value))
        for name, bitmap in target.bitmaps.items():
            if bitmap.state is BitmapState.VALID:
                dirty = bitmap.dirty | whole_granules(blocks, bitmap.granularity)
                target.bitmaps[name] = replace(bitmap, dirty=dirty)

    def add_bitmap(self, image: str, name: str, granularity: int) -> None:
        assert name not in self._images[image].bitmaps
        self._images[image].bitmaps[name] = StoredBitmap(
            BitmapState.VALID, granularity, frozenset()
        )

    def remove_bitmap(self, image: str, name: str) -> None:
        del self._images[image].bitmaps[name]

    def disable_bitmap(self, image: str, name: str) -> None:
        self._set_state(image, name, BitmapState.DISABLED)

    def crash(self, image: str) -> None:
        # QEMU marks every bitmap of an image that it has open for writing, disabled ones too.
        for name in list(self._images[image].bitmaps):
            self._set_state(image, name, BitmapState.IN_USE)

    def write_and_crash(self, image: str, start: int, count: int, value: int) -> None:
        self.write(image, start, count, value)
        self.crash(image)

    def _set_state(self, image: str, name: str, state: BitmapState) -> None:
        bitmaps = self._images[image].bitmaps
        bitmaps[name] = replace(bitmaps[name], state=state)

    def backing(self, image: str) -> str | None:
        return self._images[image].backing

    def bitmaps(self, image: str) -> Mapping[str, StoredBitmap]:
        return dict(self._images[image].bitmaps)

    def content(self, image: str) -> tuple[int, ...]:
        return tuple(self._read(image, block) for block in range(self._images[image].size))

    def _read(self, image: str, block: int) -> int:
        at: str | None = image
        while at is not None and block < self._images[at].size:
            layer = self._images[at]
            if block in layer.data:
                return layer.data[block]
            at = layer.backing
        return 0

    def merge(self, request: MergeRequest, at_moment: Callable[[], None]) -> bool:
        decisions = self._decide(
            [self._layer(image) for image in request.chain],
            request.base_index,
            {name for image in request.above for name in self._images[image].bitmaps},
            top_stays=request.top_stays,
        )
        if any(decision.loses_valid_checkpoint or decision.unguarded for decision in decisions):
            if not request.give_up_checkpoints:
                return False
            self._remove_unguarded(request, decisions)
        kept = {d.name: self._union(request, d) for d in decisions if d.fate is Fate.KEEP}

        base = self._images[request.base]
        base.bitmaps = {
            decision.name: TOMBSTONE
            for decision in decisions
            if decision.tombstone_while_top_exists or decision.name in base.bitmaps.keys() & kept
        }
        at_moment()
        self._copy(request)
        base.bitmaps |= kept
        at_moment()
        self._settle(request)
        if not request.top_stays:
            for decision in decisions:
                if decision.tombstone_while_top_exists and not decision.tombstone:
                    del base.bitmaps[decision.name]
        return True

    def merge_and_kill(self, request: MergeRequest, point: KillPoint) -> Ending:
        """Nothing happens: what a killed merge must look like, once it was run again."""
        return Ending.KILLED

    def _layer(self, image: str) -> LayerBitmaps:
        source = self._images[image]
        occurrences = {
            name: Occurrence(bitmap.state, bitmap.granularity, not bitmap.dirty)
            for name, bitmap in source.bitmaps.items()
        }
        return LayerBitmaps(image, occurrences, source.holds_bitmaps)

    def _remove_unguarded(self, request: MergeRequest, decisions: Sequence[Decision]) -> None:
        """Leaf first: an image that loses the name fails, whatever stands below it."""
        tops = (request.top,) if request.top_stays else ()
        for decision in decisions:
            if decision.unguarded:
                for image in (*request.above, *tops):
                    self._images[image].bitmaps.pop(decision.name, None)

    def _union(self, request: MergeRequest, decision: Decision) -> StoredBitmap:
        assert decision.granularity is not None
        sources = [self._images[request.chain[i]].bitmaps[decision.name] for i in decision.sources]
        blocks = frozenset[int]().union(*(source.dirty for source in sources))
        dirty = whole_granules(blocks, decision.granularity)
        return StoredBitmap(BitmapState.VALID, decision.granularity, dirty)

    def _copy(self, request: MergeRequest) -> None:
        base, top = self._images[request.base], self._images[request.top]
        for image in (*request.between, request.top):
            overlay = self._images[image]
            # What an overlay does not define beyond a shorter image below it reads as zeros.
            base.data.update(dict.fromkeys(range(base.size, overlay.size), 0))
            base.size = overlay.size
            base.data.update(overlay.data)
        assert base.size == top.size

    def _settle(self, request: MergeRequest) -> None:
        for child in request.children:
            self._images[child].backing = request.base
        if request.top_stays:
            self._images[request.top].backing = request.base
        else:
            del self._images[request.top]
        for image in request.between:
            del self._images[image]


def whole_granules(blocks: Collection[int], granularity: int) -> frozenset[int]:
    """All blocks of the granules that any of ``blocks`` lies in."""
    granules = {block // granularity for block in blocks}
    return frozenset(g * granularity + i for g in granules for i in range(granularity))
