# SPDX-License-Identifier: Apache-2.0
"""Which images a merge locks for itself, and what keeps it from getting them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from chainmerge.documents.plan import EngineName
from chainmerge.errors import ChainmergeError, Refused
from chainmerge.planning.hiding import may_need_hiding
from chainmerge.storage.bystanders import Wanted
from chainmerge.storage.errors import OpenFilesLimited
from chainmerge.storage.files import WritablePort, drop_cached
from chainmerge.storage.limits import allow_open_files
from chainmerge.storage.locks import ImageLock, LockMode, lock_image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from chainmerge.chain.model import ImageInfo
    from chainmerge.chain.target import Target
    from chainmerge.options import MergeOptions
    from chainmerge.storage.other_users import OtherUsers


def lock_all(
    stack: contextlib.ExitStack,
    target: Target,
    wait_seconds: float,
    options: MergeOptions,
    on_wait: Callable[[], None],
) -> Iterator[ImageLock]:
    """Lock the chain from its root up, then the children that will be re-pointed.

    *on_wait* is called when one has to be waited for.
    """
    for image, mode in locks_needed(target, options):
        yield stack.enter_context(lock_image(image.path, mode, wait_seconds, on_wait))


def read_from_storage(
    target: Target, options: MergeOptions, others: Sequence[ImageInfo] = ()
) -> None:
    """Drop the kernel's cache of the images that will be written, to see what the storage holds.

    And that of *others*, which an earlier run may have written to.

    After a write that failed the kernel goes on showing what was to be written, until it needs
    the memory. A switch that failed would be taken for one that was done, and top be deleted.
    """
    images = [image for image, mode in locks_needed(target, options) if mode is LockMode.WRITER]
    for image in (*images, *others):
        # What cannot be opened for writing is refused with all other obstacles.
        with contextlib.suppress(Refused):
            drop_cached(image.real_path)


def locks_needed(target: Target, options: MergeOptions) -> Iterator[tuple[ImageInfo, LockMode]]:
    """All images that a merge has to itself, in the order in which they are locked."""
    last = len(target.chain.images) - 1
    written = set()
    if options.direction != "pull":
        written.add(target.base_index)
        # Top is re-pointed past the images in between.
        if target.base_index < last - 1:
            written.add(last)
        if _may_be_extended(target, options):
            written.add(target.base_index + 1)
    if options.direction == "pull" or (options.direction == "auto" and options.keep_name):
        written.add(last)
    if options.drop_snapshots:
        # Which of them have to go is known only once all are locked.
        above_base = range(target.base_index + 1, last + 1)
        written.update(index for index in above_base if _holds_snapshots(target, index))
    for index, image in enumerate(target.chain.images):
        yield image, LockMode.WRITER if index in written else LockMode.READER
    if options.direction == "pull":
        return
    for child in target.relatives.children:
        yield child, LockMode.WRITER


def images_written(target: Target, options: MergeOptions) -> tuple[Path, ...]:
    """The images that a merge may write to or remove: nobody else may use them."""
    goes = {wanted.path for wanted in images_wanted(target, options) if wanted.dies}
    return tuple(
        image.path
        for image, mode in locks_needed(target, options)
        if mode is LockMode.WRITER or image.path in goes
    )


def _holds_snapshots(target: Target, index: int) -> bool:
    header = target.chain.images[index].header
    return header is not None and header.snapshot_count > 0


def images_wanted(target: Target, options: MergeOptions) -> tuple[Wanted, ...]:
    """What a merge wants of which images: what it locks them as, and which it may delete."""
    deletes = options.delete or options.keep_name
    merged = {image.identity for image in target.chain.images[target.base_index :]}
    return tuple(
        Wanted(image.path, mode, dies=deletes and image.identity in merged)
        for image, mode in locks_needed(target, options)
    )


def refuse_users(found: Sequence[OtherUsers]) -> None:
    for others in found:
        for refusal in others.refusals:
            raise refusal


def _may_be_extended(target: Target, options: MergeOptions) -> bool:
    """Whether the overlay may have to hide what base shows once its volume is larger."""
    on_volume = target.base.is_block_device or options.volume == "lvm"
    return on_volume and may_need_hiding(target)


def locks_held(target: Target) -> int:
    """How many files a merge has open at least: images are read through their locks."""
    images = target.chain.images
    data_files = sum(image.data_file is not None for image in images)
    return len(images) + data_files + len(target.relatives.children)


def not_writable(target: Target, options: MergeOptions) -> Iterator[ChainmergeError]:
    for image, mode in locks_needed(target, options):
        if mode is not LockMode.WRITER:
            continue
        try:
            WritablePort(image.path).close()
        except ChainmergeError as error:
            yield error


def too_many_files(target: Target, engine: EngineName) -> OpenFilesLimited | None:
    """Why the daemon could not copy: it inherits all locks and opens every image itself."""
    if engine is not EngineName.QEMU:
        return None
    try:
        allow_open_files(locks_held(target) + len(target.chain.images))
    except OpenFilesLimited as error:
        return error
    return None
