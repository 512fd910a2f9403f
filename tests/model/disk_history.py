# SPDX-License-Identifier: Apache-2.0
"""The life of a disk: what happens to it, and the truth about it.

:class:`DiskHistory` lets things happen to a tree of images that a :class:`Backend` keeps
(in memory, or real qcow2 files), and writes down for itself, without looking at any
bitmap, what the guest wrote since each checkpoint. After every step the images must agree
with that record:

*   every image reads as the guest left it, and stands on the image that it should;
*   every name that passes the chain test in an image covers all guest writes since its
    checkpoint;
*   every name that passed before a merge passes afterwards, with exactly the same bits.

Numbers are in blocks, a unit that the backend chooses. Granularities are powers of two up
to ``MAX_GRANULARITY`` and sizes are multiples of it, so that no granule is cut by a disk's
end and "exactly the same bits" has one meaning.

A merge can be killed. Until somebody runs it again, nobody can say what the image merged
into reads as, and what its bitmaps are worth: it is *spoiled*, and so are the images between
it and top. Whoever reads top, or an image above it, must notice nothing of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from typing import TYPE_CHECKING, Protocol, TypeAlias

from msgspec import Struct

from chainmerge.bitmaps.rules import BitmapState
from chainmerge.documents.progress import Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


MAX_GRANULARITY = 4


class StoredBitmap(Struct, frozen=True):
    """A bitmap as it stands in an image; ``dirty`` are blocks, whole granules of them.

    The dirty blocks of an in-use bitmap mean nothing.
    """

    state: BitmapState
    granularity: int
    dirty: frozenset[int]


class MergeRequest(Struct, frozen=True):
    """Merge ``chain[base_index]`` .. ``chain[-1]``; ``chain`` starts at the root.

    ``above`` are all images above top, leaves first; ``children`` those of them that sit
    on top directly. With ``give_up_checkpoints`` those that base cannot hold may be lost.
    A top that stays is re-pointed at base; the images between go away in any case.
    """

    chain: tuple[str, ...]
    base_index: int
    above: tuple[str, ...]
    children: tuple[str, ...]
    top_stays: bool
    give_up_checkpoints: bool

    @property
    def base(self) -> str:
        return self.chain[self.base_index]

    @property
    def top(self) -> str:
        return self.chain[-1]

    @property
    def between(self) -> tuple[str, ...]:
        return self.chain[self.base_index + 1 : -1]


class KillPoint(Struct, frozen=True):
    """When a merge is killed: after ``actions`` more actions once ``stage`` has begun."""

    stage: Stage
    actions: int


class Ending(Enum):
    """How a merge ended that was to be killed."""

    REFUSED = auto()
    KILLED = auto()
    FINISHED = auto()
    """It was done before its moment came, or all but tidying up: top is gone."""


class Backend(Protocol):
    """Keeps images. Sizes, offsets, granularities are in blocks; values are 0 to 255."""

    def create_root(self, image: str, size: int, *, holds_bitmaps: bool) -> None:
        """A new image of zeros without a backing image: qcow2 v3, or raw (no bitmaps)."""

    def create_overlay(self, image: str, backing: str, size: int) -> None:
        """A new empty overlay without bitmaps; it may be larger than what it stands on."""

    def delete(self, image: str) -> None: ...

    def write(self, image: str, start: int, count: int, value: int) -> None:
        """The guest fills blocks with a value (0: it writes zeroes); valid bitmaps record it."""

    def add_bitmap(self, image: str, name: str, granularity: int) -> None:
        """A new empty enabled bitmap."""

    def remove_bitmap(self, image: str, name: str) -> None: ...

    def disable_bitmap(self, image: str, name: str) -> None: ...

    def crash(self, image: str) -> None:
        """QEMU dies with the image open for writing: its bitmaps stay in-use."""

    def write_and_crash(self, image: str, start: int, count: int, value: int) -> None:
        """QEMU dies when the guest has written, and what it wrote is durable."""

    def merge(self, request: MergeRequest, at_moment: Callable[[], None]) -> bool:
        """Merge with chainmerge; false if it refused, and nothing was changed.

        A backend that can, calls ``at_moment`` wherever a kill could leave the images
        while top and its children still stand as before.
        """

    def merge_and_kill(self, request: MergeRequest, point: KillPoint) -> Ending:
        """Merge with chainmerge, and kill it. No checkpoint may be given up in it."""

    def backing(self, image: str) -> str | None: ...

    def bitmaps(self, image: str) -> Mapping[str, StoredBitmap]: ...

    def content(self, image: str) -> tuple[int, ...]:
        """What the guest would read from this image, one value a block."""


# Image, start, count, value.
Write: TypeAlias = "Callable[[str, int, int, int], None]"


class HistoryViolated(AssertionError):
    """The images disagree with what happened."""


class WrongBacking(HistoryViolated):
    """An image stands on another one than it should."""


class WrongContent(HistoryViolated):
    """An image does not read as the guest left it."""


class FalseCheckpoint(HistoryViolated):
    """A name passes the chain test and misses a guest write: a backup would be corrupt."""


class LostCheckpoint(HistoryViolated):
    """A name passed before a merge that could keep it, and fails now."""


class ChangedCheckpoint(HistoryViolated):
    """A merge changed which blocks a checkpoint covers."""


class WrongRefusal(HistoryViolated):
    """A merge was refused without need, or changed something although refused."""


def _union(from_leaf_down: list[StoredBitmap | None]) -> frozenset[int] | None:
    """Union of all occurrences of a name that passes the chain test, else None."""
    states = [BitmapState.ABSENT if b is None else b.state for b in from_leaf_down]
    if not passes_chain_test(states):
        return None
    return frozenset[int]().union(*(b.dirty for b in from_leaf_down if b is not None))


def passes_chain_test(states_from_leaf_down: list[BitmapState]) -> bool:
    """The consumers' test, not shared with the code under test."""
    rest = list(states_from_leaf_down)
    if not rest or rest[0] is not BitmapState.VALID:
        return False
    while rest and rest[0] is BitmapState.VALID:
        rest.pop(0)
    return all(state is BitmapState.ABSENT for state in rest)


class UnfinishedMerge(Struct, frozen=True):
    """A merge that was killed; ``held`` has base's bitmaps and those between, from before."""

    base: str
    top: str
    held: Mapping[str, Mapping[str, StoredBitmap]]


class DiskHistory:
    """One disk from its creation on; every method is one thing that happens to it.

    What could not happen in reality is silently not done: a name that the active image
    has already, a merge across a fork, and also what makes a false checkpoint without any
    merge (somebody removing a bitmap from under a valid one with a foreign tool).
    """

    def __init__(self, backend: Backend, size: int, *, raw_root: bool) -> None:
        if size % MAX_GRANULARITY:
            msg = f"the size {size} is not a multiple of {MAX_GRANULARITY} blocks"
            raise ValueError(msg)
        self.backend = backend
        self.active = "image0"
        self.backing: dict[str, str | None] = {self.active: None}
        self.sizes = {self.active: size}
        self.raw_root = raw_root
        self.spoiled: set[str] = set()
        self.unfinished: UnfinishedMerge | None = None
        self._created = 1
        self._writes = 0
        self._content: dict[str, list[int]] = {self.active: [0] * size}
        self._written_since: dict[str, dict[str, set[int]]] = {self.active: {}}
        backend.create_root(self.active, size, holds_bitmaps=not raw_root)

    # The tree.

    @property
    def images(self) -> list[str]:
        return list(self.backing)

    def chain(self, image: str) -> tuple[str, ...]:
        """From the root up to ``image``."""
        found = [image]
        while (below := self.backing[found[-1]]) is not None:
            found.append(below)
        return tuple(reversed(found))

    def children(self, image: str) -> list[str]:
        return [other for other, below in self.backing.items() if below == image]

    def above(self, image: str) -> list[str]:
        """All images above, leaves first."""
        return [found for child in self.children(image) for found in (*self.above(child), child)]

    def leaves(self) -> list[str]:
        return [image for image in self.backing if not self.children(image)]

    def mergeable(self, base: str, top: str) -> bool:
        """Whether base is below top, and no image but those of the range reads base.

        As long as a merge is unfinished, there is no other.
        """
        if self.unfinished and (base, top) != (self.unfinished.base, self.unfinished.top):
            return False
        chain = self.chain(top)
        if base == top or base not in chain:
            return False
        merged = chain[chain.index(base) :]
        return all(len(self.children(image)) == 1 for image in merged[:-1])

    def holds_bitmaps(self, image: str) -> bool:
        return not (self.raw_root and self.backing[image] is None)

    # What happens.

    def checkpoint(self, name: str, granularity: int) -> None:
        if not self.holds_bitmaps(self.active) or name in self.backend.bitmaps(self.active):
            return
        if self._is_half_settled():
            return
        self.backend.add_bitmap(self.active, name, granularity)
        self._written_since[self.active][name] = set()

    def guest_write(self, start: int, count: int) -> None:
        self._writes += 1
        self._fill(start, count, 1 + self._writes % 255, self.backend.write)

    def guest_write_zeroes(self, start: int, count: int) -> None:
        self._fill(start, count, 0, self.backend.write)

    def guest_write_and_crash(self, start: int, count: int) -> None:
        self._writes += 1
        self._fill(start, count, 1 + self._writes % 255, self.backend.write_and_crash)

    def _fill(self, start: int, count: int, value: int, write: Write) -> None:
        size = self.sizes[self.active]
        start %= size
        count = min(count, size - start)
        write(self.active, start, count, value)
        blocks = range(start, start + count)
        for block in blocks:
            self._content[self.active][block] = value
        for written in self._written_since[self.active].values():
            written.update(blocks)

    def snapshot(self, *, grow: int = 0) -> None:
        """A new overlay on the active image, as libvirt makes one."""
        self._continue_on(self.active, grow=grow)

    def revert(self, image: str) -> None:
        """The guest goes on from an older image, in a new overlay beside the others."""
        if image not in self.spoiled:
            self._continue_on(image, grow=0)

    def _continue_on(self, backing: str, *, grow: int) -> None:
        overlay = f"image{self._created}"
        self._created += 1
        size = self.sizes[backing] + grow * MAX_GRANULARITY
        self.backend.create_overlay(overlay, backing, size)
        for name, bitmap in sorted(self.backend.bitmaps(backing).items()):
            # libvirt carries on what is valid in the old active image; it does not look below.
            if bitmap.state is BitmapState.VALID:
                self.backend.add_bitmap(overlay, name, bitmap.granularity)
        self.backing[overlay] = backing
        self.sizes[overlay] = size
        self._content[overlay] = self._content[backing] + [0] * (size - self.sizes[backing])
        self._written_since[overlay] = {
            name: set(written) for name, written in self._written_since[backing].items()
        }
        self.active = overlay

    def switch_to(self, leaf: str) -> None:
        """The guest is shut down and started from another leaf."""
        if not self.children(leaf):
            self.active = leaf

    def delete_leaf(self, leaf: str) -> None:
        below = self.backing[leaf]
        # What a killed merge has spoiled is of use only to what hides it.
        if leaf != self.active and not self.children(leaf) and below and below not in self.spoiled:
            self.backend.delete(leaf)
            self._forget(leaf)

    def crash(self) -> None:
        self.backend.crash(self.active)

    def disable_bitmap(self, image: str, name: str) -> None:
        bitmap = self._open_to_meddling(image).get(name)
        if bitmap is not None and bitmap.state is BitmapState.VALID:
            self.backend.disable_bitmap(image, name)

    def remove_bitmap(self, image: str, name: str) -> None:
        """Somebody removes a bitmap from one image only."""
        if name not in self._open_to_meddling(image):
            return
        for reader in (image, *self.above(image)):
            covered = self._covered(reader, name, without=image)
            if covered is not None and not self._written_since[reader][name] <= covered:
                return
        self.backend.remove_bitmap(image, name)

    def _open_to_meddling(self, image: str) -> Mapping[str, StoredBitmap]:
        """The bitmaps of an image, if people take it for one that can be worked on."""
        if image in self.spoiled or self._is_half_settled():
            return {}
        # What is broken because of an image below base is pruned already: evidence that goes
        # now comes too late.
        if self.unfinished is not None and image in self.chain(self.unfinished.base):
            return {}
        return self.backend.bitmaps(image)

    def _is_half_settled(self) -> bool:
        """Whether a killed merge has put children of top on base already.

        They do not read top any more, so what happens to bitmaps now is not what would have
        happened, had the merge not been killed.
        """
        if self.unfinished is None:
            return False
        top = self.unfinished.top
        return any(self.backend.backing(child) != top for child in self.children(top))

    def merge(
        self, base: str, top: str, *, top_stays: bool = False, give_up_checkpoints: bool = False
    ) -> bool:
        """Merge; false if it was not possible or was refused."""
        if not self.mergeable(base, top):
            return False
        request = self._request(
            base, top, top_stays=top_stays, give_up_checkpoints=give_up_checkpoints
        )
        covered_before = self._covered_before(request)
        bitmaps_before = self._all_bitmaps()

        def no_false_checkpoint_now() -> None:
            for reader in self._sound((top, *request.above)):
                self._check_checkpoints(reader)

        if not self.backend.merge(request, no_false_checkpoint_now):
            self._check_refusal(request, bitmaps_before)
            return False
        self._finish(request, covered_before)
        return True

    def merge_and_kill(
        self, base: str, top: str, point: KillPoint, *, top_stays: bool = False
    ) -> Ending:
        """Merge, and be killed; :meth:`merge` finishes it, for the same base and top."""
        if not self.mergeable(base, top):
            return Ending.REFUSED
        request = self._request(base, top, top_stays=top_stays, give_up_checkpoints=False)
        covered_before = self._covered_before(request)
        bitmaps_before = self._all_bitmaps()
        ending = self.backend.merge_and_kill(request, point)
        match ending:
            case Ending.REFUSED:
                self._check_refusal(request, bitmaps_before)
            case Ending.FINISHED:
                self._finish(request, covered_before)
            case Ending.KILLED:
                spoiled = (base, *request.between)
                self.spoiled |= set(spoiled)
                # If this is not the first attempt, what base held is what it held then.
                self.unfinished = self.unfinished or UnfinishedMerge(
                    base, top, {image: bitmaps_before[image] for image in spoiled}
                )
        return ending

    def abandon_merge(self) -> None:
        """Nobody runs the killed merge again; the images are used as they are."""
        self.unfinished = None
        self.backing = {image: self.backend.backing(image) for image in self.backing}

    def _request(
        self, base: str, top: str, *, top_stays: bool, give_up_checkpoints: bool
    ) -> MergeRequest:
        chain = self.chain(top)
        return MergeRequest(
            chain=chain,
            base_index=chain.index(base),
            above=tuple(self.above(top)),
            children=tuple(self.children(top)),
            top_stays=top_stays,
            give_up_checkpoints=give_up_checkpoints,
        )

    def _all_bitmaps(self) -> dict[str, dict[str, StoredBitmap]]:
        return {image: dict(self.backend.bitmaps(image)) for image in self.images}

    def _covered_before(self, request: MergeRequest) -> dict[str, dict[str, frozenset[int]]]:
        """What each reader's checkpoints cover, as if no attempt had been killed."""
        if self.unfinished is None:
            return {image: self.checkpoints(image) for image in (request.top, *request.above)}
        bitmaps = self._all_bitmaps() | dict(self.unfinished.held)
        return {
            reader: {
                name: covered
                for name in bitmaps[reader]
                if (covered := _union([bitmaps[at].get(name) for at in self.chain(reader)[::-1]]))
                is not None
            }
            for reader in (request.top, *request.above)
        }

    def _finish(
        self, request: MergeRequest, covered_before: Mapping[str, Mapping[str, frozenset[int]]]
    ) -> None:
        base, top = request.base, request.top
        readers = self._sound((top, *request.above))
        self.unfinished = None
        self._settle(request)
        if not self.holds_bitmaps(base):
            return
        for reader in readers:
            self._check_kept(covered_before[reader], base if reader == top else reader)
            if reader == top and request.top_stays:
                self._check_kept(covered_before[top], top)

    def _settle(self, request: MergeRequest) -> None:
        base, top = request.base, request.top
        self.spoiled.discard(base)
        if top in self.spoiled:
            self.spoiled.add(base)
        self.sizes[base] = self.sizes[top]
        self._content[base] = list(self._content[top])
        self._written_since[base] = {
            name: set(written) for name, written in self._written_since[top].items()
        }
        for child in request.children:
            self.backing[child] = base
        for image in request.between:
            self._forget(image)
        if request.top_stays:
            self.backing[top] = base
            return
        self._forget(top)
        if self.active == top:
            self.active = base

    def _forget(self, image: str) -> None:
        self.spoiled.discard(image)
        del self.backing[image], self.sizes[image]
        del self._content[image], self._written_since[image]

    # What must hold.

    def checkpoints(self, image: str) -> dict[str, frozenset[int]]:
        """Every name that a backup of this image would trust, with the blocks it would copy."""
        names = sorted(self.backend.bitmaps(image))
        found = ((name, self._covered(image, name)) for name in names)
        return {name: covered for name, covered in found if covered is not None}

    def _covered(self, image: str, name: str, *, without: str = "") -> frozenset[int] | None:
        """What the name covers for who opens this image, without looking at one of them."""
        from_leaf_down = []
        at: str | None = image
        while at is not None:
            from_leaf_down.append(None if at == without else self.backend.bitmaps(at).get(name))
            at = self.backend.backing(at)
        return _union(from_leaf_down)

    def check(self) -> None:
        """Compare all images with what happened."""
        for image in self._sound(self.images):
            self._check_content(image)
            self._check_checkpoints(image)
        if self.unfinished is None:
            self._check_backing()

    def _sound(self, images: Iterable[str]) -> list[str]:
        """Those of the images of which anybody can say what they are worth."""
        return [image for image in images if image not in self.spoiled]

    def _check_backing(self) -> None:
        for image, below in self.backing.items():
            found = self.backend.backing(image)
            if found != below:
                msg = f"{image} stands on {found}, not on {below}"
                raise WrongBacking(msg)

    def _check_content(self, image: str) -> None:
        read = self.backend.content(image)
        if list(read) != self._content[image]:
            msg = f"{image} reads as {read}, the guest left {self._content[image]}"
            raise WrongContent(msg)

    def _check_checkpoints(self, image: str) -> None:
        for name, covered in self.checkpoints(image).items():
            missing = self._written_since[image][name] - covered
            if missing:
                msg = f"{name} passes in {image} but misses the writes to {sorted(missing)}"
                raise FalseCheckpoint(msg)

    def _check_kept(self, before: Mapping[str, frozenset[int]], image: str) -> None:
        after = self.checkpoints(image)
        for name, covered in before.items():
            if name not in after:
                msg = f"{name} passed before the merge and fails in {image} after it"
                raise LostCheckpoint(msg)
            if after[name] != covered:
                msg = f"{name} in {image} covers {sorted(after[name])}, not {sorted(covered)}"
                raise ChangedCheckpoint(msg)

    def _check_refusal(
        self, request: MergeRequest, before: Mapping[str, Mapping[str, StoredBitmap]]
    ) -> None:
        abandoned = self.spoiled and self.unfinished is None
        if not abandoned and (self.holds_bitmaps(request.base) or request.give_up_checkpoints):
            msg = f"the merge of {request.top} into {request.base} was refused"
            raise WrongRefusal(msg)
        if before != {image: dict(self.backend.bitmaps(image)) for image in self.images}:
            msg = f"the merge of {request.top} into {request.base} was refused half done"
            raise WrongRefusal(msg)

    def describe(self) -> Iterator[str]:
        """The tree, an image a line: for people who look at a violation."""
        for image in self.images:
            bitmaps = ", ".join(
                f"{name} {bitmap.state} {sorted(bitmap.dirty)}"
                for name, bitmap in sorted(self.backend.bitmaps(image).items())
            )
            mark = "*" if image == self.active else " "
            note = ", spoiled" if image in self.spoiled else ""
            below = self.backend.backing(image) or "nothing"
            yield f"{mark}{image} on {below}{note}: {bitmaps or 'no bitmaps'}"
