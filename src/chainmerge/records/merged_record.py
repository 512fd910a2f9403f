# SPDX-License-Identifier: Apache-2.0
"""Which merges are finished: ``.TOP.chainmerge-merged``.

Written before top's file is deleted or replaced, so that the same command, run again, says that
the merge is done instead of reporting a missing file, or worse, taking the renamed base for a
new overlay. In a pull it is written before the switch after which top stands on base's backing
file: the same command would pull that next.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from chainmerge.errors import ChainmergeError
from chainmerge.records.changes import is_there, stands_on, what_stands_at
from chainmerge.records.doing import CopiedSoFar
from chainmerge.records.files import (
    StateFile,
    UnusableState,
    read_state,
    write_state,
)
from chainmerge.records.identity import (
    BlockDevices,
    ImageIdentity,
    Sameness,
    identify,
    may_be_same,
    same_image,
)
from chainmerge.records.request import RecordedRequest
from chainmerge.storage.lvm import uuids_in
from chainmerge.storage.volume_names import mapper_name_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from chainmerge.storage.lvm import VolumeUuids


_PLACES: Final = frozenset({"top", "base", "result", "path", "file"})


class DoomedImage(msgspec.Struct, frozen=True):
    """An image that is to be deleted, if it is still the same.

    A logical volume has as its ``path`` the name that it has wherever it is active.
    """

    path: str
    identity: ImageIdentity

    @property
    def volume(self) -> VolumeUuids | None:
        """The logical volume that it is; None if it is a file."""
        return uuids_in(self.identity.birth) if self.identity.kind == "block" else None


class DoomedLink(msgspec.Struct, frozen=True):
    """A symbolic link that is to be deleted, once it leads nowhere.

    ``text`` is what stands in it, ``file`` the file that it led to.
    """

    path: str
    text: str
    file: str


class Pulled(msgspec.Struct, frozen=True):
    """That the merge is a pull, and the backing file that top has once it is done.

    The name is as top's header has it, None for none. Nothing else tells as well: a guest that
    goes on writing to top between a kill and the rerun makes QEMU change the rest of the header.
    ``onto`` is the image of that name: another one can have come to stand there.
    ``leaked_before`` are the clusters of top that were leaked already when it began (ranges:
    first cluster, number of clusters): what else is leaked since is its own. None once nothing
    of its own is leaked any more, and in a record of a version that did not record that.
    ``base`` is what is pulled from, where that is recorded. ``copied`` says now and then how far
    the copy has come, and is None before that.
    """

    backing: str | None
    onto: ImageIdentity | None = None
    leaked_before: list[tuple[int, int]] | None = None
    base: ImageIdentity | None = None
    copied: CopiedSoFar | None = None


class Superseded(msgspec.Struct, frozen=True):
    """Images that a live merge has left in place, and that nothing may be merged from any more.

    The guest writes to base, or to an image on base. ``since`` is what the times of change of
    top said when the VM had closed it, empty if they say nothing.
    """

    images: list[DoomedImage]
    since: str


class LeftInPlace(msgspec.Struct, frozen=True):
    """Top, where it stays although all of it is in base.

    ``since`` and ``base_since`` are what the times of change of the two said then, empty if
    they say nothing (:func:`chainmerge.records.changes.data_changed`).
    """

    identity: ImageIdentity
    since: str
    base_since: str


class MergedRecord(msgspec.Struct, frozen=True):
    """A merge whose top is about to be deleted or replaced, or of no use any more.

    ``delete`` are the images that are still to be deleted: once that is done the list is empty.
    A top on a logical volume is among them if base takes over its name, which is free only then.
    Where volumes are removed, ``top``, ``base`` and ``result`` are names as in
    :class:`DoomedImage`.
    ``left`` is top, where nothing is deleted or renamed. ``request`` is what was asked for, where
    that is recorded. ``data_written_ns`` is when what the result shows was written last, as
    :func:`data_written_ns` said before the merge; None where that is not known.
    """

    top: str
    base: str
    result: str
    result_format: str
    result_identity: ImageIdentity
    keep_name: bool
    delete: list[DoomedImage]
    pulled: Pulled | None = None
    superseded: Superseded | None = None
    request: RecordedRequest | None = None
    left: LeftInPlace | None = None
    links: list[DoomedLink] = []
    data_written_ns: int | None = None

    def names_base(self, path: Path) -> bool:
        """Whether *path* is base's, or that of a link to it that was deleted with it."""
        known = {self.base, *(link.path for link in self.links if link.file == self.base)}
        volume = mapper_name_in(Path(self.base))
        if volume is not None:
            known.add(os.path.realpath(self.base))
        names = {os.path.realpath(path), os.path.abspath(path)}  # noqa: PTH100
        if not (names & known or (volume is not None and volume == mapper_name_in(path))):
            return False
        # The number of a volume that is gone is another one's by now.
        pulled_from = None if self.pulled is None else self.pulled.base
        try:
            there = identify(path)
        except (OSError, ValueError):
            return True
        return pulled_from is None or may_be_same(there, pulled_from)

    @property
    def renames_volume(self) -> VolumeUuids | None:
        """The logical volume that takes over the name of top; None if none does."""
        if not self.keep_name or self.result_identity.kind != "block":
            return None
        return uuids_in(self.result_identity.birth)

    @property
    def beside(self) -> Path:
        """The name by which what else is kept of base is found.

        That of a file stays where it was when the file is renamed, that of a volume goes with it.
        """
        is_volume = self.pulled is None and self.result_identity.kind == "block"
        return Path(self.result_identity.path if is_volume else self.base)

    @property
    def known_request(self) -> RecordedRequest:
        """What was requested, as far as it is recorded."""
        if self.request is not None:
            return self.request
        options: dict[str, Any] = {}
        if self.pulled is not None:
            options["direction"] = "pull"
        if self.delete:
            options["delete"] = True
        if self.keep_name:
            options["keep_name"] = True
        return RecordedRequest([self.top], [self.base], {}, options)


def _owner(record: MergedRecord) -> ImageIdentity | None:
    """The identity of top, as far as the record is of one that stays."""
    if record.superseded is not None:
        return record.superseded.images[0].identity
    if record.left is not None:
        return record.left.identity
    # Base is what has the name of top afterwards.
    is_result = record.pulled is not None or record.renames_volume is not None
    return record.result_identity if is_result else None


def record_merged(top: Path, record: MergedRecord) -> None:
    """Record, durably, that *top* has been merged, before its file goes."""
    write_state(MERGED_RECORD.place_of_volume(Path(record.top)) or MERGED_RECORD.place(top), record)
    for link in record.links:
        # With the link gone, its name is all that the same command has.
        if link.file == record.top:
            write_state(MERGED_RECORD.place_of_link(Path(link.path)), record)


def load_merged_record(top: Path) -> MergedRecord | None:
    """The record of a finished merge of *top*; None if absent or unreadable."""
    try:
        return MERGED_RECORD.load(top)
    except OSError:
        # A name that no file can have.
        return None


def read_merged_record(file: Path, devices: BlockDevices) -> MergedRecord | None:
    """The record in *file*; None if absent or unreadable."""
    try:
        return read_state(file, MergedRecord, devices, _PLACES, _problems)
    except (OSError, UnusableState):
        return None


def _problems(record: MergedRecord) -> Iterator[str]:
    if record.superseded is not None and not record.superseded.images:
        yield "it names no image that was left"


MERGED_RECORD: Final = StateFile("chainmerge-merged", read_merged_record, _owner)
# Each takes the path of top.
merged_record_file = MERGED_RECORD.found
forget_merged_record = MERGED_RECORD.forget


def data_written_ns(image: Path) -> int | None:
    """When what an image file shows was written last, in nanoseconds since 1970; None of a device.

    A merge that ended under its name has written no new data: what it found counts, as long as
    nobody has written since.

    Raises OSError if there is nothing.
    """
    status = image.stat()
    if stat.S_ISBLK(status.st_mode):
        return None
    record = load_merged_record(image)
    if record is None or record.data_written_ns is None:
        return status.st_mtime_ns
    real = image.resolve()
    if record.result != str(real) or not same_image(record.result_identity, identify(real)):
        return status.st_mtime_ns
    try:
        recorded_at = merged_record_file(real).stat().st_mtime_ns
    except OSError:
        return status.st_mtime_ns
    return record.data_written_ns if status.st_mtime_ns <= recorded_at else status.st_mtime_ns


def latest_data_written_ns(images: Iterable[Path]) -> int | None:
    """The latest of what :func:`data_written_ns` says of some images; None if it says nothing.

    Raises OSError if one is not there.
    """
    return max(filter(None, map(data_written_ns, images)), default=None)


def note_deleted(top: Path, record: MergedRecord) -> None:
    """Record that nothing is left to delete: what comes to stand there is another merge's.

    A record that stays as it is says no more than that which is deleted may be again, if it is
    still the same image.
    """
    if record.delete:
        with contextlib.suppress(ChainmergeError):
            record_merged(top, written_again(record, delete=[]))


def written_again(record: MergedRecord, **changes: Any) -> MergedRecord:
    """A record with some changes, which is about to replace the one that there is.

    It is newer then than what somebody may have written to the result since.
    """
    written = record.data_written_ns
    if written is not None:
        with contextlib.suppress(OSError):
            written = data_written_ns(Path(record.result))
    return msgspec.structs.replace(record, data_written_ns=written, **changes)


def is_pulled(record: MergedRecord, pulled: Pulled, top: Path) -> bool:
    """Whether *top*, as it is reached, stands on what it stands on once the pull is done.

    Raises what opening and reading an image raises.
    """
    if not stands_on(top, pulled.backing):
        return False
    if pulled.onto is None or pulled.backing is None:
        return True
    if any(is_there(one.identity) for one in record.delete):
        # It has not come to its end, so that this is not a later pull.
        return True
    backing = top.parent / pulled.backing.removeprefix("file:")
    return not backing.exists() or what_stands_at(backing, pulled.onto) is not Sameness.OTHER
