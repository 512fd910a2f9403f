# SPDX-License-Identifier: Apache-2.0
"""From an image down to the root of its chain."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from chainmerge.chain.allowed_places import (
    AllowedPlaces,
    Directories,
    allowed_places_of,
)
from chainmerge.chain.errors import (
    BackingCycle,
    BackingFileMissing,
    BackingFileOutside,
    ChainTooLong,
    FormatContradiction,
    FormatMissing,
    ImageReplaced,
    TopFormatUnknown,
)
from chainmerge.chain.model import (
    Chain,
    ChainPolicy,
    Identity,
    ImageFormat,
    ImageInfo,
    format_meant_by,
)
from chainmerge.chain.names import backing_path, without_detours
from chainmerge.chain.reading import (
    DeclaredFormat,
    allowed_data_file,
    begins_as_qcow2,
    describe_at,
    identity_at,
    identity_of_opened,
)
from chainmerge.documents.text import printable
from chainmerge.errors import ChainmergeError, Refused
from chainmerge.qcow2.known_headers import KnownHeaders
from chainmerge.storage.errors import ImageMissing
from chainmerge.storage.files import FileReadable

if TYPE_CHECKING:
    from chainmerge.qcow2.header import Header

_THE_USER = "the format given for it"


def discover(top: Path, policy: ChainPolicy, headers: KnownHeaders | None = None) -> Chain:
    """Follow the backing names from *top* down to the root.

    Every image is opened once, read, and closed again; nothing is locked.

    Args:
        top: where to begin.
        policy: what the user allows and declares.
        headers: those that have been parsed before.

    Raises:
        Refused: one of :mod:`chainmerge.chain.errors`, or of the format layer where an
            image is damaged.
    """
    path = without_detours(top.absolute())
    allowed = allowed_places_of([path], policy)
    images = list(walk_down(path, policy, allowed, headers))
    if images[-1].foreign and not policy.metadata_only:
        # Few chains stand on such an image, and no other needs what starts processes.
        from chainmerge.chain.foreign.sizing import sized_by_qemu  # noqa: PLC0415

        images[-1] = sized_by_qemu(images[-1], allowed)
    noted = [_with_size_note(child, backing) for child, backing in pairwise(images)]
    return Chain((images[-1], *reversed(noted)))


def walk_down(
    top: Path, policy: ChainPolicy, allowed: AllowedPlaces, headers: KnownHeaders | None = None
) -> Iterator[ImageInfo]:
    """Yield *top* and then each image's backing file; see :func:`discover` for what it raises.

    Args:
        top: absolute path.
        policy: what the user allows and declares.
        allowed: where backing files may lie.
        headers: those that have been parsed before.
    """
    headers = headers or KnownHeaders()
    walk = _Walk(policy, _by_real_path(policy.formats), allowed, Directories(), headers)
    image = walk.read_top(top)
    seen = {image.identity: image}
    yield image
    while image.backing is not None:
        if len(seen) == policy.max_images:
            raise ChainTooLong(str(top), policy.max_images)
        image = walk.read_backing(image, image.backing, seen)
        seen[image.identity] = image
        yield image


class _Walk(Struct, frozen=True):
    """What is the same for all images of one discovery."""

    policy: ChainPolicy
    formats: Mapping[str, str]
    allowed: AllowedPlaces
    directories: Directories
    headers: KnownHeaders

    def read_top(self, path: Path) -> ImageInfo:
        with FileReadable(path) as readable:
            given = self._given_format(path)
            if given is None and not begins_as_qcow2(readable):
                raise TopFormatUnknown(str(path))
            declared_by = None if given is None else _THE_USER
            declared = DeclaredFormat(given or ImageFormat.QCOW2, declared_by)
            return self._read(path, Path(os.path.realpath(path)), readable, declared)

    def read_backing(
        self, child: ImageInfo, path: Path, seen: Mapping[Identity, ImageInfo]
    ) -> ImageInfo:
        name = child.backing_name or ""
        # Some files do something when they are opened, so what may not be used is not opened.
        place = self._allowed_place(child, name, path, self.directories)
        try:
            readable = FileReadable(path)
        except Refused as error:
            raise BackingFileMissing(
                str(child.path), name, printable(error.sentence), _found_instead(child, error)
            ) from error
        with readable:
            # Nothing is read before it is known that what was opened is what was looked at.
            if readable.kernel_path() != str(place):
                place = self._allowed_place(child, name, path, Directories())
                if identity_at(place) != identity_of_opened(readable):
                    raise ImageReplaced(str(path))
            twin = seen.get(identity_of_opened(readable))
            if twin is not None:
                raise BackingCycle(str(child.path), name, str(twin.path))
            # Of a device that is the link that tells it from others.
            real_path = Path(os.path.realpath(path)) if readable.is_block_device else place
            image = self._read(path, real_path, readable, self._format_of(child, path, readable))
        if not image.format_declared:
            note = "the image above does not declare its format; it begins like a qcow2 image"
            return replace(image, notes=(*image.notes, note))
        return image

    def _read(
        self, path: Path, real_path: Path, readable: FileReadable, declared: DeclaredFormat
    ) -> ImageInfo:
        image = describe_at(real_path, path, readable, declared, self.headers)
        header = image.header
        if header is None:
            return image
        # QEMU does not open such an image either. Untrusted bitmaps it passes over.
        if image.bitmaps_problem is not None and image.bitmaps_trusted:
            raise image.bitmaps_problem
        name = header.backing_name
        return replace(
            image,
            backing=None if name is None else without_detours(backing_path(image.path, name)),
            data_file=self._data_file(image, header),
        )

    def _data_file(self, image: ImageInfo, header: Header) -> Path | None:
        if self.policy.metadata_only:
            return None
        return allowed_data_file(image, header, self.policy.allow_data_files)

    def _given_format(self, path: Path) -> str | None:
        given = self.formats.get(os.path.realpath(path)) if self.formats else None
        return None if given is None else format_meant_by(given)

    def _format_of(self, child: ImageInfo, path: Path, readable: FileReadable) -> DeclaredFormat:
        declared = None if child.header is None else child.header.backing_format
        given = self._given_format(path)
        if declared is not None:
            meant = format_meant_by(declared)
            if given not in {None, meant}:
                raise FormatContradiction(str(path), str(child.path), declared, str(given))
            return DeclaredFormat(meant, str(child.path))
        if given is not None:
            return DeclaredFormat(given, _THE_USER)
        if begins_as_qcow2(readable):
            return DeclaredFormat(ImageFormat.QCOW2, None)
        raise FormatMissing(str(child.path), child.backing_name or "", str(path))

    def _allowed_place(
        self, child: ImageInfo, name: str, path: Path, directories: Directories
    ) -> Path:
        """Where *path* leads to, which must be where backing files may lie."""
        named, actual = directories.reached(path), directories.resolved(path)
        if self.allowed.holds(named) and self.allowed.holds(actual):
            return actual
        if self.allowed.names(path):
            return actual
        if not self.allowed.holds(named):
            outside, how = named, f"is {str(named)!r}"
        else:
            outside, how = actual, f"is a symbolic link to {str(actual)!r}"
        inside = ", ".join(sorted(map(str, self.allowed.directories)))
        raise BackingFileOutside(str(child.path), name, how, inside, str(outside.parent))


def _found_instead(child: ImageInfo, error: Refused) -> str:
    """Which files could be the lost backing file of *child*, as an addition to a hint."""
    if not isinstance(error, ImageMissing):
        return ""
    # Not needed as long as nothing is lost.
    from chainmerge.chain.lost_backing import files_that_could_back  # noqa: PLC0415

    try:
        candidates = files_that_could_back(child)
    except ChainmergeError:
        return ""
    if not candidates:
        return ""
    named = "; ".join(f"{one.path} ({', '.join(one.reasons)})" for one in candidates)
    return f". Files that could be the missing one: {printable(named)}"


def _by_real_path(formats: Mapping[Path, str]) -> dict[str, str]:
    return {os.path.realpath(path): name for path, name in formats.items()}


def _with_size_note(child: ImageInfo, backing: ImageInfo) -> ImageInfo:
    if child.guest_size is None or backing.guest_size is None:
        return child
    growth = child.guest_size - backing.guest_size
    if growth == 0:
        return child
    if growth > 0:
        note = f"its disk is {growth} bytes larger than that of its backing file"
    else:
        note = f"its disk is {-growth} bytes smaller than that of its backing file"
    return replace(child, notes=(*child.notes, note))
