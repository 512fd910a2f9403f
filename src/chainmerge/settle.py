# SPDX-License-Identifier: Apache-2.0
"""The end of a merge: children re-pointed, files renamed and deleted, as the plan says.

Each step is atomic and each can be done again, so that a rerun goes on wherever an
interrupted run stopped. What is to be deleted is recorded beforehand
(:class:`chainmerge.journal.MergedRecord`): afterwards there is nothing to tell from.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from chainmerge.engines.metadata import change_backing
from chainmerge.journal import (
    DoomedImage,
    MergedRecord,
    forget_merged_record,
    identify,
    load_merged_record,
    record_merged,
    same_image,
)
from chainmerge.options import Direction
from chainmerge.qcow2.header import SECTOR
from chainmerge.storage.files import FileReadable, WritablePort, fsync_directory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainmerge.chain import ImageInfo
    from chainmerge.planning import MergeFacts, MergePlan, Repoint


def repoint(repoints: Sequence[Repoint]) -> tuple[str, ...]:
    """Give images another backing file; returns their paths.

    Raises what :func:`chainmerge.engines.metadata.change_backing` raises.
    """
    for change in repoints:
        with WritablePort(change.child) as port:
            change_backing(port, change.new_backing, change.new_format)
    return tuple(change.child for change in repoints)


def record_intent(facts: MergeFacts, plan: MergePlan) -> MergedRecord | None:
    """Record what is going to be renamed and deleted; None where nothing is."""
    if facts.direction is Direction.PULL:
        # Written before the switch.
        return load_merged_record(facts.top.real_path)
    if plan.rename is None and not plan.delete:
        # A record of an older merge under this name says nothing about this one.
        forget_merged_record(facts.top.real_path)
        return None
    result = facts.top.real_path if plan.rename else facts.base.real_path
    by_path = {str(image.path): image for image in facts.merged_images}
    record = MergedRecord(
        top=str(facts.top.real_path),
        base=str(facts.base.real_path),
        result=str(result),
        result_format=facts.base.format,
        result_identity=identify(facts.base.real_path),
        keep_name=plan.rename is not None,
        delete=[_doomed(by_path[path]) for path in plan.delete],
    )
    record_merged(facts.top.real_path, record)
    return record


def record_pull(facts: MergeFacts, plan: MergePlan, head: bytes) -> None:
    """Record a pull before the switch to *head*, top's new first sector."""
    top = facts.top.real_path
    by_path = {str(image.path): image for image in facts.merged_images}
    record = MergedRecord(
        top=str(top),
        base=str(facts.base.real_path),
        result=str(top),
        result_format=facts.top.format,
        result_identity=identify(top),
        keep_name=False,
        delete=[_doomed(by_path[path]) for path in plan.delete],
        head=hashlib.sha256(head).hexdigest(),
    )
    record_merged(top, record)


def _doomed(image: ImageInfo) -> DoomedImage:
    return DoomedImage(str(image.real_path), identify(image.real_path))


def rename_base(facts: MergeFacts) -> None:
    """Give base the name of top, whose file this deletes.

    A backing name in base that counts from base's directory is first changed to count from
    top's.
    """
    base, target = facts.base, facts.top.real_path
    if base.backing is not None and base.backing_name and base.path.parent != target.parent:
        stored = base.backing_name.removeprefix("file:")
        if not stored.startswith("/"):
            header = base.header
            assert header is not None
            with WritablePort(base.real_path) as port:
                change_backing(port, str(base.backing.resolve()), header.backing_format)
    base.real_path.rename(target)
    fsync_directory(target.parent)
    if target.parent != base.real_path.parent:
        fsync_directory(base.real_path.parent)


def delete_recorded(record: MergedRecord) -> tuple[str, ...]:
    """Delete the images that a record names, each only if it is still the same file."""
    deleted = []
    for doomed in record.delete:
        path = Path(doomed.path)
        try:
            is_same = same_image(identify(path), doomed.identity)
        except FileNotFoundError:
            continue
        if is_same:
            path.unlink()
            fsync_directory(path.parent)
            deleted.append(doomed.path)
    return tuple(deleted)


def finished_before(record: MergedRecord | None, top: Path, base: Path | None) -> bool:
    """Whether *record* says that the merge which is asked for was done, but for deletions."""
    if record is None:
        return False
    if base is not None and os.path.realpath(base) != record.base:
        return False
    try:
        if not same_image(identify(Path(record.result)), record.result_identity):
            return False
    except FileNotFoundError:
        return False
    if record.head is not None:
        return _starts_with(Path(record.result), record.head)
    if record.keep_name:
        return True
    return not top.exists()


def _starts_with(image: Path, head: str) -> bool:
    """Whether the image's first sector has the SHA-256 digest *head*."""
    with FileReadable(image) as readable:
        return hashlib.sha256(readable.read(0, SECTOR)).hexdigest() == head
