# SPDX-License-Identifier: Apache-2.0
"""Real images: written by QEMU, merged by chainmerge.

The guest is a qemu-io, so it is QEMU that records in bitmaps what is written. Bitmaps are
added, removed and disabled by a qemu-storage-daemon, images are created by qemu-img, and a
crash is a SIGKILL. Merges run in this process; those that are to be killed, in a child of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import traceback
import zlib
from dataclasses import dataclass
from functools import wraps
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import numpy as np
from hypothesis import currently_in_test_context, note

import chainmerge
from chainmerge.bitmaps.rules import BitmapState
from chainmerge.bitmaps.stored import state_of
from chainmerge.chain.layers import layer_of_qcow2, layer_of_raw
from chainmerge.chain.names import backing_path
from chainmerge.chain.view import GuestView
from chainmerge.engines.qemu.daemon import StorageDaemon
from chainmerge.errors import Refused
from chainmerge.options import EngineChoice, MergeOptions
from chainmerge.qcow2.bitmaps import read_bits, read_directory
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.storage.files import FileReadable, WritablePort
from chainmerge.storage.locks import LockMode, lock_image
from tests.model.disk_history import (
    Ending,
    KillPoint,
    MergeRequest,
    StoredBitmap,
    WrongBacking,
)
from tests.model.qemu_processes import Fill, Guest, Host, QemuBitmap, QemuDisagrees, digest_of
from tests.support.qemu import create

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from chainmerge.documents.progress import ProgressEvent
    from chainmerge.qcow2.bits import BitSet

KIB = 1 << 10
SECONDS_FOR_THE_DYING = 60

_EXIT_REFUSED = 3


@dataclass(frozen=True, slots=True)
class ImageKind:
    """How a qcow2 image is laid out."""

    cluster_size: int
    extended_l2: bool = False


@dataclass(frozen=True, slots=True)
class Variety:
    """What a block of the history is in bytes, and the kinds of image, each in its turn."""

    block: int
    kinds: tuple[ImageKind, ...]


PLAIN = ImageKind(64 * KIB)
SMALL = ImageKind(4 * KIB)
TINY = ImageKind(512)
EXTENDED = ImageKind(128 * KIB, extended_l2=True)

VARIETIES = (
    Variety(64 * KIB, (PLAIN,)),
    Variety(64 * KIB, (PLAIN, EXTENDED)),
    Variety(4 * KIB, (PLAIN,)),
    Variety(4 * KIB, (EXTENDED, SMALL, TINY)),
    Variety(256 * KIB, (PLAIN, SMALL)),
    Variety(512, (PLAIN, TINY)),
)


class Workshop:
    """The processes that all histories of a test share, and the images that they start from.

    *engine* does the merges.
    """

    def __init__(self, directory: Path, engine: EngineChoice) -> None:
        self.directory = directory
        self.engine = engine
        self._templates: dict[tuple[object, ...], Path] = {}
        with contextlib.ExitStack() as stack:
            self.guest = stack.enter_context(Guest())
            self.host = stack.enter_context(Host())
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    def backend(self, variety: int) -> RealBackend:
        place = Path(tempfile.mkdtemp(dir=self.directory))
        return RealBackend(self, place, VARIETIES[variety % len(VARIETIES)])

    def new_image(
        self, path: Path, size: int, kind: ImageKind, backing: str | None, backing_format: str
    ) -> None:
        """What qemu-img creates, which is the same every time."""
        key = (size, kind, backing, backing_format)
        if key not in self._templates:
            self._templates[key] = self._created(len(self._templates), *key)
        shutil.copyfile(self._templates[key], path)

    def _created(
        self, number: int, size: int, kind: ImageKind, backing: str | None, backing_format: str
    ) -> Path:
        directory = self.directory / f"template{number}"
        directory.mkdir()
        if backing is not None:
            # qemu-img looks at it.
            create(directory / backing, size, fmt=backing_format)
        return create(
            directory / "image",
            size,
            backing=backing,
            backing_format=backing_format,
            cluster_size=kind.cluster_size,
            extended_l2="on" if kind.extended_l2 else "off",
        )


def scratch_directory() -> contextlib.AbstractContextManager[str]:
    """A directory in memory where there is one: thousands of histories flush a million times."""
    memory = Path("/dev/shm")
    has_memory = memory.is_dir() and os.access(memory, os.W_OK)
    return tempfile.TemporaryDirectory(
        prefix="chainmerge-", dir=memory if has_memory else None, ignore_cleanup_errors=True
    )


class RealBackend:
    """A :class:`tests.model.disk_history.Backend` of image files in a directory."""

    def __init__(self, workshop: Workshop, directory: Path, variety: Variety) -> None:
        self.directory = directory
        self._workshop = workshop
        self._engine = workshop.engine
        self._block = variety.block
        self._kinds = variety.kinds
        self._created = 0
        # A merge can give base the name of top's file, so names of files are not those of images.
        self._files: dict[str, Path] = {}
        self._raw: str | None = None
        # Read once, as long as nothing was written: histories look at everything at every step.
        self._bitmaps: dict[str, dict[str, StoredBitmap]] = {}
        self._contents: dict[str, tuple[int, ...]] = {}

    # Images.

    def create_root(self, image: str, size: int, *, holds_bitmaps: bool) -> None:
        if holds_bitmaps:
            self._create(image, size, None)
            return
        self._raw = image
        self._files[image] = create(self.directory / image, size * self._block, fmt="raw")

    def create_overlay(self, image: str, backing: str, size: int) -> None:
        self._create(image, size, backing)

    def _create(self, image: str, size: int, backing: str | None) -> None:
        kind = self._kinds[self._created % len(self._kinds)]
        self._created += 1
        path = self.directory / image
        name = None if backing is None else self._files[backing].name
        backing_format = "qcow2" if backing is None else self._format(backing)
        self._workshop.new_image(path, size * self._block, kind, name, backing_format)
        self._files[image] = path

    def _format(self, image: str) -> str:
        return "raw" if image == self._raw else "qcow2"

    def delete(self, image: str) -> None:
        self._forget_what_was_read()
        self._files.pop(image).unlink()

    def backing(self, image: str) -> str | None:
        if image == self._raw:
            return None
        path = self._files[image]
        with FileReadable(path) as readable:
            name = Qcow2Image(readable).header.backing_name
        if name is None:
            return None
        below = backing_path(path, name)
        found = [image for image, file in self._files.items() if file == below]
        if not found:
            msg = f"{image} stands on {name}, which is no image any more"
            raise WrongBacking(msg)
        return found[0]

    # The guest.

    def write(self, image: str, start: int, count: int, value: int) -> None:
        self._forget_what_was_read()
        fill = self._fill(start, count, value)
        self._workshop.guest.write(self._files[image], self._format(image), [fill])

    def write_and_crash(self, image: str, start: int, count: int, value: int) -> None:
        self._forget_what_was_read()
        fill = self._fill(start, count, value)
        self._workshop.guest.write_and_be_killed(self._files[image], self._format(image), [fill])

    def crash(self, image: str) -> None:
        self._forget_what_was_read()
        self._workshop.guest.write_and_be_killed(self._files[image], self._format(image), [])

    def _fill(self, start: int, count: int, value: int) -> Fill:
        return Fill(start * self._block, count * self._block, value)

    # Bitmaps.

    def add_bitmap(self, image: str, name: str, granularity: int) -> None:
        self._forget_what_was_read()
        self._workshop.host.add_bitmap(self._files[image], name, granularity * self._block)

    def remove_bitmap(self, image: str, name: str) -> None:
        self._forget_what_was_read()
        self._workshop.host.remove_bitmap(self._files[image], name)

    def disable_bitmap(self, image: str, name: str) -> None:
        self._forget_what_was_read()
        self._workshop.host.disable_bitmap(self._files[image], name)

    # Merges.

    def merge(self, request: MergeRequest, at_moment: Callable[[], None]) -> bool:
        def on_progress(event: ProgressEvent) -> None:
            if not event.done:
                self._forget_what_was_read()
                at_moment()

        options = self._options(request, request.give_up_checkpoints)
        before = self._checksums()
        try:
            if request.give_up_checkpoints:
                self._remove_unguarded(request, options)
            self._run(request, options, on_progress)
        except Refused as refusal:
            if currently_in_test_context():
                note(f"refused: {refusal}")
            self._require_unchanged(before, request)
            return False
        self._settle(request, options)
        return True

    def merge_and_kill(self, request: MergeRequest, point: KillPoint) -> Ending:
        options = self._options(request, False)
        before = self._checksums()
        top = self._inode(request.top)
        ending = self._run_in_a_child(request, options, point)
        self._forget_what_was_read()
        if ending is Ending.REFUSED:
            self._require_unchanged(before, request)
            return ending
        if ending is Ending.KILLED:
            if not self._is_over(request, top):
                return ending
            if request.top_stays:
                self._delete_between(request)
            self._run(request, options, lambda _event: None)
            self._settle(request, options)
            self._remove_spent_tombstones(request)
            return Ending.FINISHED
        self._settle(request, options)
        return Ending.FINISHED

    def _remove_spent_tombstones(self, request: MergeRequest) -> None:
        """The last thing that a merge does, and not made good: the next one prunes them."""
        if request.top_stays:
            return
        needed = {name for image in request.above for name in self.bitmaps(image)}
        for name, bitmap in dict(self.bitmaps(request.base)).items():
            if bitmap.state is BitmapState.DISABLED and not bitmap.dirty and name not in needed:
                self.remove_bitmap(request.base, name)

    def _is_over(self, request: MergeRequest, top: int) -> bool:
        """Whether a killed merge had nothing left to do that could still fail.

        Nobody can go on with a top that is gone. And one that stands on base instead of the
        images between stands where it should: what the guest writes next is another merge's.
        """
        if not self._files[request.top].exists() or self._inode(request.top) != top:
            return True
        return bool(request.between) and self.backing(request.top) == request.base

    def _options(self, request: MergeRequest, give_up_checkpoints: bool) -> MergeOptions:
        if request.top_stays:
            return MergeOptions(
                drop_bitmaps=give_up_checkpoints, engine=self._engine, direction="commit"
            )
        # The same for every attempt at this merge: it is "the same command" that finishes it.
        keep_name = int(request.top.removeprefix("image")) % 3 == 0 and self._are_on_top(request)
        # With images between, keeping top's name alone would leave them behind.
        delete = not keep_name or bool(request.between)
        return MergeOptions(
            delete=delete,
            keep_name=keep_name,
            drop_bitmaps=give_up_checkpoints,
            engine=self._engine,
            # What the model in memory does: it refuses a raw base where a pull would go on.
            direction="commit",
        )

    def _are_on_top(self, request: MergeRequest) -> bool:
        """Whether no attempt with another settlement has given children of top base's name."""
        return all(self.backing(child) == request.top for child in request.children)

    def _run(
        self,
        request: MergeRequest,
        options: MergeOptions,
        on_progress: Callable[[ProgressEvent], None],
    ) -> None:
        self._forget_what_was_read()
        try:
            chainmerge.merge(
                self._files[request.top],
                self._files[request.base],
                options=options,
                on_progress=on_progress,
            )
        finally:
            self._forget_what_was_read()

    def _remove_unguarded(self, request: MergeRequest, options: MergeOptions) -> None:
        """What the refusal tells people to do, leaf first."""
        top, base = self._files[request.top], self._files[request.base]
        planned = chainmerge.plan(top, base, options=options).bitmaps
        readers = (*request.above, *((request.top,) if request.top_stays else ()))
        for name in (bitmap.name for bitmap in planned if bitmap.unguarded):
            for image in readers:
                if name in self.bitmaps(image):
                    self.remove_bitmap(image, name)

    def _settle(self, request: MergeRequest, options: MergeOptions) -> None:
        """Follow what the merge did, and do what it leaves to people."""
        if options.keep_name:
            self._files[request.base] = self._files[request.top]
        if not request.top_stays:
            del self._files[request.top]
        for image in request.between:
            assert request.top_stays or not self._files[image].exists()
        self._delete_between(request)
        for image in request.between:
            del self._files[image]

    def _delete_between(self, request: MergeRequest) -> None:
        """A top that stays leaves these to people, who are told that they are of no use."""
        for image in request.between:
            self._files[image].unlink(missing_ok=True)

    def _run_in_a_child(
        self, request: MergeRequest, options: MergeOptions, point: KillPoint
    ) -> Ending:
        pid = os.fork()
        if pid == 0:
            self._merge_in_the_child(request, options, point)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == -signal.SIGKILL:
            # The guest goes on when the daemon is gone too, and its locks with it.
            for path in (self._files[request.base], self._files[request.top]):
                if path.exists():
                    lock_image(path, LockMode.WRITER, SECONDS_FOR_THE_DYING).release()
            return Ending.KILLED
        if status not in (0, _EXIT_REFUSED):
            raise AssertionError((self.directory / "last-words").read_text())
        return Ending.FINISHED if status == 0 else Ending.REFUSED

    def _merge_in_the_child(
        self, request: MergeRequest, options: MergeOptions, point: KillPoint
    ) -> NoReturn:
        try:
            self._run(request, options, _time_bomb(point))
        except Refused:
            os._exit(_EXIT_REFUSED)
        except BaseException:
            (self.directory / "last-words").write_text(traceback.format_exc())
            os._exit(1)
        os._exit(0)

    def _checksums(self) -> dict[str, int]:
        """Of everything in the directory but for what no guest and no checkpoint rests on."""
        files = (path for path in self.directory.iterdir() if not path.name.startswith("."))
        return {path.name: zlib.crc32(path.read_bytes()) for path in files}

    def _require_unchanged(self, before: dict[str, int], request: MergeRequest) -> None:
        after = self._checksums()
        changed = sorted(name for name in before | after if before.get(name) != after.get(name))
        if changed and not request.give_up_checkpoints:
            raise AssertionError(f"the merge was refused, but {changed} changed")

    # What is there.

    def bitmaps(self, image: str) -> Mapping[str, StoredBitmap]:
        if image not in self._bitmaps:
            self._bitmaps[image] = self._read_bitmaps(image)
        return self._bitmaps[image]

    def _read_bitmaps(self, image: str) -> dict[str, StoredBitmap]:
        return {
            name: StoredBitmap(state, granularity // self._block, self._blocks_of(bits))
            for name, (state, granularity, bits) in self._stored_bitmaps(image).items()
        }

    def _stored_bitmaps(self, image: str) -> dict[str, tuple[BitmapState, int, BitSet | None]]:
        if image == self._raw:
            return {}
        with FileReadable(self._files[image]) as readable:
            qcow2 = Qcow2Image(readable)
            found = {}
            for entry in read_directory(qcow2):
                state = state_of(qcow2, entry)
                bits = None if state is BitmapState.IN_USE else read_bits(qcow2, entry)
                found[entry.name] = (state, entry.granularity, bits)
            return found

    def _blocks_of(self, bits: BitSet | None) -> frozenset[int]:
        if bits is None:
            return frozenset()
        starts, lengths = bits.ranges()
        return frozenset(
            block
            for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
            for block in range(start // self._block, (start + length) // self._block)
        )

    def content(self, image: str) -> tuple[int, ...]:
        if image not in self._contents:
            self._contents[image] = self._read_content(image)
        return self._contents[image]

    def _read_content(self, image: str) -> tuple[int, ...]:
        with contextlib.ExitStack() as stack:
            layers = []
            at: str | None = image
            while at is not None:
                readable = stack.enter_context(FileReadable(self._files[at]))
                raw = at == self._raw
                layers.append(
                    layer_of_raw(readable)
                    if raw
                    else layer_of_qcow2(Qcow2Image(readable), readable)
                )
                at = self.backing(at)
            view = GuestView(tuple(reversed(layers)))
            data = np.frombuffer(view.read(0, view.virtual_size), dtype=np.uint8)
        blocks = data.reshape(-1, self._block)
        torn = np.flatnonzero((blocks != blocks[:, :1]).any(axis=1))
        assert not len(torn), f"blocks {torn.tolist()} of {image} are torn"
        return tuple(blocks[:, 0].tolist())

    def _forget_what_was_read(self) -> None:
        self._bitmaps.clear()
        self._contents.clear()

    # What QEMU says to it.

    def ask_qemu(self, images: Sequence[str]) -> None:
        """Fail unless QEMU reads the same content and the same bitmaps from these images."""
        for image in images:
            self._ask_about_content(image)
            if image != self._raw:
                self._ask_about_bitmaps(image)

    def _ask_about_content(self, image: str) -> None:
        fills = []
        start = 0
        for value, run in groupby(self.content(image)):
            count = len(list(run))
            fills.append(self._fill(start, count, value))
            start += count
        self._workshop.guest.require_content(self._files[image], self._format(image), fills)

    def _ask_about_bitmaps(self, image: str) -> None:
        found = self._workshop.host.bitmaps(self._files[image])
        expected = {
            name: QemuBitmap(
                granularity,
                state is BitmapState.VALID,
                bits is None,
                "" if bits is None else digest_of(bits.to_packed().tobytes()),
            )
            for name, (state, granularity, bits) in self._stored_bitmaps(image).items()
        }
        if found != expected:
            raise QemuDisagrees(f"bitmaps of {image}: QEMU says {found}, we say {expected}")

    def throw_away(self) -> None:
        shutil.rmtree(self.directory)

    def _inode(self, image: str) -> int:
        return self._files[image].stat().st_ino


def _time_bomb(point: KillPoint) -> Callable[[ProgressEvent], None]:
    """Set up the kill of this process; returns what tells it how far the merge is.

    What counts as an action: everything that changes a file, and everything that the daemon
    is told. The process dies before it, so the point 0 of a stage is its beginning.
    """
    armed = False
    left = point.actions

    def act() -> None:
        nonlocal left
        if not armed:
            return
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def announced(event: ProgressEvent) -> None:
        nonlocal armed
        armed = armed or event.stage is point.stage
        act()

    for owner, name in (
        (WritablePort, "write"),
        (WritablePort, "flush"),
        (WritablePort, "reserve"),
        (StorageDaemon, "execute"),
        (os, "replace"),
        (Path, "rename"),
        (Path, "unlink"),
    ):
        setattr(owner, name, _preceded(act, getattr(owner, name)))
    return announced


def _preceded(act: Callable[[], None], do: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(do)
    def acting(*args: Any, **kwargs: Any) -> Any:
        act()
        return do(*args, **kwargs)

    return acting
