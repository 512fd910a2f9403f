# SPDX-License-Identifier: Apache-2.0
"""The small files that outlive the process: where they lie, how they are written and read.

They lie beside the image, so that any host that sees the image sees them; for block devices they
lie in :data:`STATE_DIRECTORY`, named after the device's identity and not after its number or its
node, which another volume can have after the next boot. What is recorded of a logical volume that
is about to be removed is named after its name: it is all that is known of it then. Each holds one
document as a line of JSON, written to a temporary name, synced and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, Generic, TypeVar

import msgspec
from msgspec import Struct

from chainmerge.errors import ChainmergeError, RecordsUnusable, Refused
from chainmerge.records.changes import as_called_now, named_in
from chainmerge.records.identity import (
    BlockDevices,
    ImageIdentity,
    device_identity,
    identify,
    may_be_same,
)
from chainmerge.storage.errors import ImageMissing
from chainmerge.storage.files import FileReadable, fsync_directory, write_file_durably
from chainmerge.storage.lvm_volumes import lasting_path
from chainmerge.storage.volume_names import mapper_name_in

if TYPE_CHECKING:
    from collections.abc import Iterator

STATE_DIRECTORY: Final = Path("/var/lib/chainmerge")
_LONGEST_NAME: Final = 200
# 65,535 bitmaps with the longest names there are, escaped.
_LARGEST: Final = 512 << 20

Document = TypeVar("Document", bound=msgspec.Struct)
Kept = TypeVar("Kept")


class UnusableState(Exception):
    """A file that cannot be read or holds no such document; the message says why."""


class StateDirectoryUnusable(RecordsUnusable, Refused):
    """There is no place for what must outlive the process."""

    code: ClassVar[str] = "state-directory-unusable"
    template: ClassVar[str] = "{directory} cannot be used: {reason}"
    hint: ClassVar[str] = (
        "run the command as root, or make {directory} a directory that you can write to"
    )
    explanation: ClassVar[str] = (
        "While guest data is copied into base, base's checkpoints are kept in a small file, so "
        "that they survive if the command is killed. For an image file that file lies beside the "
        "image, for a block device in /var/lib/chainmerge. The images were not changed."
    )
    directory: str
    reason: str


class StateFile(Struct, Generic[Kept], frozen=True):
    """One kind of small file, of which an image has one at the most.

    Attributes:
        suffix: What the names of these files end in.
        read: What is in a file; None if there is none. Raises what it says that it raises.
        owner: The image that a file is of, by what is in it; None if it does not say.
    """

    suffix: str
    read: Callable[[Path, BlockDevices], Kept | None]
    owner: Callable[[Kept], ImageIdentity | None]

    def is_called(self, name: str) -> bool:
        """Whether *name* is that of such a file."""
        return name.endswith(f".{self.suffix}")

    def place(self, image: Path) -> Path:
        """Where the file of *image* is written."""
        return self._place(_real(image))

    def _place(self, real: Path) -> Path:
        if not real.is_block_device():
            return self.place_of_volume(real) or self._beside(real)
        unique = device_identity(real.stat().st_rdev)
        name = _file_name(unique) if unique else _name_of_node(real)
        return STATE_DIRECTORY / f"{name}.{self.suffix}"

    def place_of_link(self, link: Path) -> Path:
        """As :meth:`place`, for the name of a symbolic link itself, wherever it leads."""
        return self._beside(link)

    def place_of_volume(self, path: Path) -> Path | None:
        """As :meth:`place`, for the name of a logical volume, which may be gone; else None."""
        name = mapper_name_in(path)
        return (
            None
            if name is None
            else STATE_DIRECTORY / f"{_file_name(f'volume-{name}')}.{self.suffix}"
        )

    def _beside(self, file: Path) -> Path:
        return file.parent / f".{_short(file.name)}.{self.suffix}"

    def found(self, image: Path) -> Path:
        """Where the file of *image* stands, whether or not there is one.

        As :meth:`place`, but elsewhere if what is there is *image*'s: under the name that a
        logical volume has taken over, or under the name of a block device's node, where earlier
        versions put its state. Raises what ``read`` raises.
        """
        real = _real(image)
        file = self._place(real)
        if not real.is_block_device() or file.exists():
            return file
        by_name = self.place_of_volume(lasting_path(real))
        by_node = STATE_DIRECTORY / f"{_name_of_node(real)}.{self.suffix}"
        return next(
            (one for one in (by_name, by_node) if one is not None and self._is_of(one, real)), file
        )

    def _is_of(self, file: Path, image: Path) -> bool:
        """Whether what is in *file* says that it is *image*'s. Raises what ``read`` raises."""
        kept = self.read(file, BlockDevices())
        of = None if kept is None else self.owner(kept)
        return of is not None and may_be_same(of, identify(image))

    def load(self, image: Path) -> Kept | None:
        """What an earlier run has left for *image*; None if that is nothing.

        Raises what ``read`` raises.
        """
        return self.read(self.found(image), BlockDevices())

    def forget(self, image: Path) -> None:
        """Remove the file of *image*, durably; nothing happens if there is none."""
        remove_durably(self.place(image))
        with contextlib.suppress(ChainmergeError):
            remove_durably(self.found(image))


def _real(image: Path) -> Path:
    # Path.resolve() of Python 3.11 fails where links form a loop.
    return Path(os.path.realpath(image))


def _name_of_node(device: Path) -> str:
    return str(device).strip("/").replace("/", "-")


def _file_name(identity: str) -> str:
    """What a file for a device of this identity is called."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,150}", identity):
        return identity
    return hashlib.sha256(os.fsencode(identity)).hexdigest()


def _short(name: str) -> str:
    """A name to which something can be added: file names have at most 255 bytes."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= _LONGEST_NAME else hashlib.sha256(encoded).hexdigest()


def make_directory(directory: Path) -> None:
    """Make sure that there is a directory for what must outlive the process.

    Raises StateDirectoryUnusable.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StateDirectoryUnusable(str(directory), error.strerror or str(error)) from error


def write_state(file: Path, document: msgspec.Struct) -> None:
    """Write a document durably; replaces what is there.

    Raises chainmerge.errors.Failed where the file system has no room, StateDirectoryUnusable.
    """
    make_directory(file.parent)
    write_file_durably(file, encoded(document), 0o600)


def read_state(
    file: Path,
    form: type[Document],
    devices: BlockDevices,
    places: frozenset[str] = frozenset(),
    problems: Callable[[Document], Iterator[str]] = lambda _document: iter(()),
) -> Document | None:
    """The document in *file*, as images are called by now; None if there is no such file.

    *places* are the fields that hold paths of images. Raises UnusableState, also with the first of
    the *problems* that the document has.
    """
    try:
        with FileReadable(file) as readable:
            content = readable.read(0, min(readable.size, _LARGEST + 1))
    except ImageMissing:
        return None
    except ChainmergeError as error:
        raise UnusableState(error.sentence) from error
    if len(content) > _LARGEST:
        raise UnusableState(f"it is larger than {_LARGEST} bytes")
    document = decoded(content, form)
    try:
        problem = next(problems(document), None)
        if problem is None and not all(is_path(path) for path in named_in(document, places)):
            problem = "a name in it is not a path"
    except UnicodeEncodeError as error:
        raise UnusableState("a name in it is not a valid file name") from error
    if problem is not None:
        raise UnusableState(problem)
    return as_called_now(document, devices, places)


def is_path(text: str) -> bool:
    """Whether a document names what can be the absolute path of a file."""
    return text.startswith("/") and b"\0" not in os.fsencode(text)


def remove_durably(file: Path) -> None:
    """Remove a file for good; nothing happens if there is none."""
    try:
        file.unlink()
    except OSError:
        # A file system that is mounted read-only says so before it looks for the name.
        if not os.path.lexists(file):
            return
        raise
    fsync_directory(file.parent)


def encoded(document: msgspec.Struct) -> bytes:
    """The document as a line of JSON, line feed included."""
    # Not by msgspec: names of files may be no UTF-8.
    text = json.dumps(msgspec.to_builtins(document), ensure_ascii=True)
    return text.encode("ascii") + b"\n"


def decoded(text: bytes, form: type[Document]) -> Document:
    """The document that :func:`encoded` made *text* of. Raises UnusableState."""
    try:
        return msgspec.convert(json.loads(text), type=form)
    except (ValueError, RecursionError, MemoryError, msgspec.MsgspecError) as error:
        raise UnusableState(f"it cannot be parsed ({type(error).__name__})") from error
