# SPDX-License-Identifier: Apache-2.0
"""Gives an image another backing file: the same content under another name.

QEMU's tool for that, ``qemu-img rebase -u``, checks nothing, and opens the image for writing: a
kill leaves its bitmaps in-use. Here the name changes in one write of the header, and only if the
image shows the same data afterwards and every checkpoint covers the same as before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from chainmerge.bitmaps.rules import LayerBitmaps, chain_test
from chainmerge.bitmaps.stored import bitmaps_of
from chainmerge.chain.comparing import first_difference
from chainmerge.chain.discovery import discover
from chainmerge.chain.errors import BackingCycle, BackingFileOutside, WrongFormat
from chainmerge.chain.lost_backing import files_that_could_back
from chainmerge.chain.model import Chain, ImageFormat, ImageInfo
from chainmerge.chain.names import name_to_store
from chainmerge.chain.opening import OpenChain, OpenImage, open_chain
from chainmerge.chain.reading import DeclaredFormat, allowed_data_file, describe, open_for_writing
from chainmerge.chain.target import policy_of
from chainmerge.chain.view import GuestView
from chainmerge.documents.images import BackingCandidate, BackingReport, RelinkReport
from chainmerge.documents.progress import ProgressEvent, Stage, never, unheard
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.engines.metadata.backing import change_backing
from chainmerge.errors import ChainmergeError, Refused
from chainmerge.options import Access
from chainmerge.qcow2.bits import BitSet, union_all
from chainmerge.qcow2.snapshots import read_snapshots
from chainmerge.records.unfinished import status
from chainmerge.repairing.errors import (
    RelinkChangesCheckpoints,
    RelinkChangesContent,
    RelinkIncomplete,
    RelinkUncheckable,
    RelinkUnfinished,
)
from chainmerge.storage.files import FileReadable, drop_cached
from chainmerge.storage.locks import LockMode, lock_image
from chainmerge.storage.other_hosts import held_by_this_host

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.chain.model import ChainPolicy


def find_backing(image: str | Path, access: Access | None = None) -> BackingReport:
    """What an image names as its backing file, and if that is lost, the files that could be it.

    Raises:
        Refused: the image cannot be read.
        SearchPathUnusable: a directory cannot be read.
    """
    access = access or Access()
    info = _read_alone(Path(image), policy_of(access))
    problem: str | None = None
    candidates: tuple[BackingCandidate, ...] = ()
    try:
        discover(info.path, policy_of(access))
    except ChainmergeError as error:
        problem = error.sentence
        candidates = tuple(
            BackingCandidate(str(one.path), one.format, one.reasons)
            for one in files_that_could_back(info, [Path(place) for place in access.search])
        )
    declared = info.header.backing_format if info.header else None
    return BackingReport(
        REPORT_VERSION, str(info.path), info.backing_name, declared, problem, candidates
    )


def relink(
    image: str | Path,
    backing: str | Path | None,
    access: Access | None = None,
    *,
    unchecked: bool = False,
    on_progress: Callable[[ProgressEvent], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> RelinkReport:
    """Make *backing* the backing file of *image*, in one write of the image's header.

    What the image shows with its old backing file and with the new one is compared first, and so
    are the checkpoints. The same call again finds everything done.

    Args:
        image: a qcow2 image that nobody has open.
        backing: the file; None to remove the backing file, if the image no longer needs one. Its
            format is that of ``access.formats``, otherwise the one that the image declares.
        access: how images may be found and reached.
        unchecked: do not compare: the caller knows that the content is the same.
        on_progress: called while content is compared.
        should_stop: asked while content is compared.

    Raises:
        Refused: nothing was changed.
        Interrupted: *should_stop* said yes; nothing was changed.
        Failed, OutcomeUnknown: see :func:`chainmerge.engines.metadata.backing.change_backing`.
    """
    access = access or Access()
    policy = policy_of(access)
    with contextlib.ExitStack() as stack:
        stack.enter_context(held_by_this_host([Path(image)], access))
        lock = stack.enter_context(lock_image(image, LockMode.WRITER, access.lock_wait))
        drop_cached(image)
        info = _read_alone(Path(image), policy)
        _require_finished(info)
        new = _new_chain(info, None if backing is None else Path(backing), policy)
        _lock_to_read(stack, new, access)
        verified: tuple[str, ...] = ()
        if not unchecked:
            old = _old_chain(info, policy)
            _lock_to_read(stack, old, access)
            on_old = stack.enter_context(open_chain(Chain((*old, info)), (lock,)))
            on_new = stack.enter_context(open_chain(Chain((*new, info)), (lock,)))
            compared = _Comparison(on_old, on_new, on_progress or unheard, should_stop or never)
            verified = tuple(_verify(compared))
        name, format_name = _as_stored(info, new)
        if (name, format_name) != (info.backing_name, _declared(info)):
            _write_backing(info, name, format_name)
        _require_stands_on(info, name, format_name)
    return RelinkReport(
        version=REPORT_VERSION,
        image=str(info.path),
        old_backing=info.backing_name,
        backing=name,
        backing_format=format_name,
        verified=verified,
        warnings=tuple(_warnings(info, new, unchecked=unchecked)),
    )


def _lock_to_read(stack: contextlib.ExitStack, images: Sequence[ImageInfo], access: Access) -> None:
    for image in images:
        stack.enter_context(lock_image(image.path, LockMode.READER, access.lock_wait))


def _write_backing(info: ImageInfo, name: str | None, format_name: str | None) -> None:
    with open_for_writing(info) as port:
        change_backing(port, name, format_name)


def _read_alone(path: Path, policy: ChainPolicy) -> ImageInfo:
    """An image, whatever its backing name leads to."""
    path = path.absolute()
    with FileReadable(path) as readable:
        info = describe(path, readable, DeclaredFormat(ImageFormat.QCOW2, "what is asked for"))
    if info.bitmaps_problem is not None and info.bitmaps_trusted:
        raise info.bitmaps_problem
    assert info.header is not None
    return replace(info, data_file=allowed_data_file(info, info.header, policy.allow_data_files))


def _declared(info: ImageInfo) -> str | None:
    return info.header.backing_format if info.header else None


def _require_finished(info: ImageInfo) -> None:
    """A merge that was interrupted relies on what its images stand on."""
    for unfinished in status([info.path]).merges:
        raise RelinkUnfinished(str(info.path), unfinished.base, unfinished.files[0])


def _new_chain(info: ImageInfo, backing: Path | None, policy: ChainPolicy) -> tuple[ImageInfo, ...]:
    if backing is None:
        return ()
    path = backing.absolute()
    declared = _declared(info)
    formats = {Path(one).resolve(): name for one, name in policy.formats.items()}
    if declared is not None:
        formats.setdefault(path.resolve(), declared)
    try:
        chain = discover(path, replace(policy, formats=formats))
    except WrongFormat as error:
        raise WrongFormat(error.image, str(info.path)) from error
    for below in chain.images:
        if below.identity == info.identity:
            raise BackingCycle(str(chain.top.path), str(backing), str(info.path))
    return chain.images


def _old_chain(info: ImageInfo, policy: ChainPolicy) -> tuple[ImageInfo, ...]:
    """What the image stands on now.

    Raises:
        RelinkUncheckable: it cannot be read, so nothing can be compared with it.
        BackingFileOutside: it may be read if the caller says so.
    """
    try:
        return discover(info.path, policy).images[:-1]
    except BackingFileOutside:
        raise
    except Refused as error:
        raise RelinkUncheckable(str(info.path), error.sentence) from error


class _Comparison(Struct, frozen=True):
    """An image on its old backing file and on the new one, both open."""

    old: OpenChain
    new: OpenChain
    on_progress: Callable[[ProgressEvent], None]
    should_stop: Callable[[], bool]

    @property
    def image(self) -> OpenImage:
        return self.old.images[-1]

    @property
    def path(self) -> str:
        return str(self.image.info.path)

    @property
    def backing(self) -> str:
        below = self.new.images[:-1]
        return str(below[-1].info.path) if below else "no backing file"

    def difference(self, old: GuestView, new: GuestView, size: int) -> int | None:
        """The first of *size* guest bytes that differs."""

        def progress(done: int) -> None:
            self.on_progress(ProgressEvent(Stage.VERIFY, done, size))

        return first_difference(old, new, 0, size, progress=progress, should_stop=self.should_stop)


def _verify(compared: _Comparison) -> Iterator[str]:
    """Compare content and checkpoints; yields sentences for the report.

    Raises RelinkUncheckable, RelinkChangesContent, RelinkChangesCheckpoints, Interrupted.
    """
    for one in (*compared.old.images, *compared.new.images):
        if one.info.encrypted:
            reason = f"{one.info.path} is encrypted"
            raise RelinkUncheckable(compared.path, reason)
        if one.info.guest_size is None:
            reason = f"{one.info.path} is of the format {one.info.format!r}"
            problem = one.info.size_problem
            raise RelinkUncheckable(compared.path, problem.sentence if problem else reason)
    size = compared.image.info.virtual_size
    offset = compared.difference(compared.old.view(), compared.new.view(), size)
    if offset is not None:
        raise RelinkChangesContent(compared.path, compared.backing, offset, "the image")
    yield f"content of all {size} guest bytes compared with what the image showed before"
    yield from _verify_snapshots(compared)
    changed = sorted(_changed_checkpoints(compared))
    if changed:
        raise RelinkChangesCheckpoints(
            compared.path, compared.backing, ", ".join(map(repr, changed))
        )
    yield "every checkpoint covers the same as before"


def _verify_snapshots(compared: _Comparison) -> Iterator[str]:
    """Internal snapshots read from below too, and elsewhere than the image does."""
    image = compared.image.image
    snapshots = read_snapshots(image) if image is not None else ()
    if not snapshots:
        return
    size = max(snapshot.disk_size for snapshot in snapshots)
    old, new = compared.old.images[:-1], compared.new.images[:-1]
    offset = compared.difference(_view(old), _view(new), size)
    if offset is not None:
        raise RelinkChangesContent(
            compared.path, compared.backing, offset, "an internal snapshot of the image"
        )
    yield f"content of {size} bytes below the internal snapshots compared"


def _view(images: Sequence[OpenImage]) -> GuestView:
    return GuestView(tuple(one.layer for one in images))


def _changed_checkpoints(compared: _Comparison) -> Iterator[str]:
    """Names that are worth something else on the new backing file, to whatever reads them.

    An image above may have the name too: what is below this one is evidence for that.
    """
    old, new = (
        [(one, bitmaps_of(one)) for one in reversed(chain.images)]
        for chain in (compared.old, compared.new)
    )
    names = {name for _, layer in (*old, *new) for name in layer.occurrences}
    for name in names:
        before, after = _worth(name, old), _worth(name, new)
        if (
            before.passes != after.passes
            or before.is_below != after.is_below
            or (before.passes and not _bits(name, new).covers(_bits(name, old)))
        ):
            yield name


class _Worth(Struct, frozen=True):
    """Whether a name passes the chain test from the image down, or is only below the image."""

    passes: bool
    is_below: bool


def _worth(name: str, leaf_first: Sequence[tuple[OpenImage, LayerBitmaps]]) -> _Worth:
    states = [layer.state(name) for _, layer in leaf_first]
    in_image = name in leaf_first[0][1].occurrences
    is_below = not in_image and any(name in layer.occurrences for _, layer in leaf_first)
    return _Worth(chain_test(states).passes, is_below)


def _bits(name: str, leaf_first: Sequence[tuple[OpenImage, LayerBitmaps]]) -> BitSet:
    depth = chain_test([layer.state(name) for _, layer in leaf_first]).depth
    bits = [one.bits(name) for one, _ in leaf_first[:depth]]
    size = leaf_first[0][0].info.virtual_size
    return union_all(bits, size, min(one.granularity for one in bits))


def _as_stored(info: ImageInfo, new: Sequence[ImageInfo]) -> tuple[str | None, str | None]:
    if not new:
        return None, None
    return name_to_store(info, new[-1]), new[-1].format


def _require_stands_on(info: ImageInfo, name: str | None, format_name: str | None) -> None:
    """Read the header again. Raises RelinkIncomplete."""
    found = _header_of(info)
    if found != (name, format_name):
        raise RelinkIncomplete(str(info.path), str(found[0]))


def _header_of(info: ImageInfo) -> tuple[str | None, str | None]:
    with FileReadable(info.real_path) as readable:
        again = describe(info.path, readable, DeclaredFormat(ImageFormat.QCOW2, None))
    return again.backing_name, _declared(again)


def _warnings(info: ImageInfo, new: Sequence[ImageInfo], *, unchecked: bool) -> Iterator[str]:
    if unchecked:
        yield (
            "nothing was compared: if the new backing file has other content, the guest's disk is "
            "wrong where the image has no data of its own"
        )
        names = sorted(entry.name for entry in info.bitmaps)
        if names:
            yield (
                f"checkpoints were not compared either ({', '.join(map(repr, names))}): unless "
                "this is exactly the file that was there before, the next backup must be a full one"
            )
    if new and new[-1].real_path.parent != info.real_path.parent:
        yield (
            f"{new[-1].path} is in another directory: commands on {info.path} need "
            f"--allow-backing {new[-1].real_path.parent}"
        )
