# SPDX-License-Identifier: Apache-2.0
"""Files that could be the missing backing file of an image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from chainmerge.chain.model import ImageFormat, ImageInfo, format_meant_by
from chainmerge.chain.names import path_from_header, possible_backing_paths
from chainmerge.chain.reading import (
    DeclaredFormat,
    begins_as_qcow2,
    describe,
    identity_at,
    identity_of_opened,
)
from chainmerge.chain.surroundings import surroundings_of
from chainmerge.errors import ChainmergeError
from chainmerge.storage.files import FileReadable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

MOST_CANDIDATES: Final = 5


class Candidate(Struct, frozen=True):
    """A file that could be a lost backing file, and what speaks for it, strongest first."""

    path: Path
    format: str
    reasons: tuple[str, ...]


def files_that_could_back(image: ImageInfo, search: Sequence[Path] = ()) -> tuple[Candidate, ...]:
    """Name the files that could be the backing file of *image*, the likeliest first.

    A matching name, size or set of bitmaps is not proof: whoever chooses has to know, or the
    content has to be compared. An image above this one cannot be below it.

    Args:
        image: an image whose backing file is not where its header says.
        search: directories to look in besides those around the image.

    Returns:
        At most :data:`MOST_CANDIDATES`.

    Raises:
        SearchPathUnusable, TooManyFiles
    """
    surroundings = surroundings_of([image.path], search)
    near = _candidates(image, surroundings.near())
    # What lies further away is a stranger's more often than not.
    around = [one for one in _candidates(image, surroundings.around()) if _weight(one) > 1]
    return tuple([*near, *around][:MOST_CANDIDATES])


def _candidates(image: ImageInfo, paths: Iterable[Path]) -> list[Candidate]:
    found = [one for path in paths if (one := _candidate(image, path)) is not None]
    return sorted(found, key=lambda one: (-_weight(one), str(one.path)))


def _weight(candidate: Candidate) -> int:
    return len(candidate.reasons) + (3 if candidate.reasons[0] == _SAME_NAME else 0)


_SAME_NAME: Final = "it has the name that the image asks for"


def _candidate(image: ImageInfo, path: Path) -> Candidate | None:
    try:
        with FileReadable(path) as readable:
            if identity_of_opened(readable) == image.identity:
                return None
            is_qcow2 = begins_as_qcow2(readable)
            declared = image.header.backing_format if image.header else None
            if declared == ImageFormat.QCOW2 and not is_qcow2:
                return None
            found = ImageFormat.QCOW2 if is_qcow2 else ImageFormat.RAW
            as_format = format_meant_by(declared) if declared else found
            other = describe(path, readable, DeclaredFormat(as_format, str(image.path)))
    except (ChainmergeError, OSError):
        return None
    if _stands_on(other, image):
        return None
    reasons = tuple(_reasons(image, other))
    is_likely = _SAME_NAME in reasons or (is_qcow2 and bool(reasons))
    return Candidate(path, other.format, reasons) if is_likely else None


def _stands_on(other: ImageInfo, image: ImageInfo) -> bool:
    names = possible_backing_paths(other.path, other.backing_name or "")
    return any(identity_at(name) == image.identity for name in names)


def _reasons(image: ImageInfo, other: ImageInfo) -> Iterator[str]:
    wanted = Path(path_from_header(image.backing_name or "")).name
    if wanted and other.path.name == wanted:
        yield _SAME_NAME
    if other.guest_size == image.guest_size:
        yield "its disk has the same size"
    shared = _shared_names(image, other)
    if shared:
        yield f"it has bitmaps of the same names: {', '.join(map(repr, shared))}"


def _shared_names(image: ImageInfo, other: ImageInfo) -> list[str]:
    most = 3
    names = {entry.name for entry in image.bitmaps}
    shared: Iterable[str] = sorted(names & {entry.name for entry in other.bitmaps})
    return list(shared)[:most]
