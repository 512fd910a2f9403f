# SPDX-License-Identifier: Apache-2.0
"""Logical volumes of a chain that are not active: activated for a while, or at least known."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from msgspec import Struct

from chainmerge.chain.allowed_places import allowed_places_of, reached
from chainmerge.chain.discovery import discover
from chainmerge.chain.errors import BackingFileMissing
from chainmerge.errors import ChainmergeError, Failed, Refused
from chainmerge.storage import lvm
from chainmerge.storage.errors import ImageMissing
from chainmerge.storage.lvm import VolumeUuids
from chainmerge.storage.lvm_volumes import find_volume, uuids_at
from chainmerge.storage.volume_errors import LvmFailed, VolumeNotActivated

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.chain.model import Chain, ChainPolicy


class VolumeStaysActive(Failed):
    """A logical volume that was activated cannot be deactivated again."""

    code: ClassVar[str] = "volume-stays-active"
    template: ClassVar[str] = (
        "{volume} was activated for this command and cannot be deactivated: {reason}; everything "
        "else is done"
    )
    hint: ClassVar[str] = (
        "find out who has it open, then deactivate it with 'lvchange -an {volume}'"
    )
    explanation: ClassVar[str] = (
        "With --activate, logical volumes of the chain that are not active are activated, and "
        "deactivated again when the command ends. Somebody has opened the volume in the meantime. "
        "The command itself has done its work."
    )
    volume: str
    reason: str


@contextlib.contextmanager
def volumes_activated(top: str | Path, policy: ChainPolicy) -> Iterator[tuple[str, ...]]:
    """Have the logical volumes of *top*'s chain active in the block; gives those that were not.

    A volume that an image names is activated only if it may serve as a backing file.

    Raises:
        Refused: what discovery raises, for a reason other than an inactive volume.
        VolumeNotActivated, LvmMissing, LvmUnfinished: a volume cannot be activated.
        VolumeStaysActive: one cannot be deactivated afterwards.
    """
    with _deactivated_afterwards() as activated:
        while (path := _inactive(Path(top).absolute(), policy)) is not None:
            activated.append(_activate(path))
        yield tuple(volume.path for volume in activated)


@contextlib.contextmanager
def neighbours_activated(top: str | Path, policy: ChainPolicy) -> Iterator[tuple[str, ...]]:
    """Have the volumes beside those of *top*'s chain active too; gives those that were not.

    Only then can be seen what stands on the images of the chain. One that cannot be activated
    stays as it is, and is known as that (:func:`inactive_neighbours`).

    Raises:
        Refused: what discovery raises.
        VolumeStaysActive: one cannot be deactivated afterwards.
    """
    with _deactivated_afterwards() as activated:
        for neighbour in inactive_neighbours(discover(Path(top), policy)):
            with contextlib.suppress(ChainmergeError):
                activated.append(_activate(str(neighbour)))
        yield tuple(volume.path for volume in activated)


@contextlib.contextmanager
def _deactivated_afterwards() -> Iterator[list[_Activated]]:
    """Gives a list of volumes, of which those that are in it then are deactivated at the end.

    Those that are removed by then are left out, whatever has their name.

    Raises:
        VolumeStaysActive: one cannot be.
    """
    activated: list[_Activated] = []
    try:
        yield activated
    except BaseException:
        for volume in reversed(activated):
            with contextlib.suppress(ChainmergeError):
                _deactivate(volume)
        raise
    for volume in reversed(activated):
        try:
            _deactivate(volume)
        except ChainmergeError as error:
            reason = str(getattr(error, "reason", error.sentence))
            raise VolumeStaysActive(volume.path, reason) from error


class _Activated(Struct, frozen=True):
    """A volume by the name by which it was activated; and its UUIDs, where they are known."""

    path: str
    uuids: VolumeUuids | None


def _activate(path: str) -> _Activated:
    try:
        lvm.activate(path, path)
    except LvmFailed as error:
        raise VolumeNotActivated(path, error.reason) from error
    return _Activated(path, uuids_at(Path(path)))


def _deactivate(volume: _Activated) -> None:
    """Deactivate it, whatever it is called by now; nothing happens if it is gone."""
    path = volume.path
    if volume.uuids is not None and uuids_at(Path(path)) != volume.uuids:
        found = find_volume(path, volume.uuids)
        if found is None:
            return
        path = str(found.path)
    lvm.deactivate(path, path)


def _inactive(top: Path, policy: ChainPolicy) -> str | None:
    """The path of the first volume of the chain that is not active; None if all are.

    Raises what discovery raises.
    """
    cause: Refused
    try:
        discover(top, policy)
    except ImageMissing as error:
        missing, cause = Path(error.image), error
    except BackingFileMissing as error:
        if not isinstance(error.__cause__, ImageMissing):
            raise
        missing, cause = Path(error.__cause__.image), error
        # A guest may name what it likes.
        allowed = allowed_places_of([top], policy)
        if not (allowed.holds(reached(missing)) or allowed.names(missing)):
            raise
    else:
        return None
    path = os.path.normpath(missing)
    try:
        # One that is active, and yet has no such name, would be activated forever.
        active = lvm.is_active(path, path)
    except Refused:
        raise cause from None
    if active:
        raise cause
    return path


def inactive_neighbours(chain: Chain) -> tuple[Path, ...]:
    """Inactive volumes beside those of the chain, in order.

    They can hold images that stand on images of the chain.
    """
    groups = frozenset(
        name.vg_uuid
        for image in chain.images
        if image.is_block_device
        and (name := lvm.device_mapper_name(image.path.stat().st_rdev)) is not None
    )
    if not groups:
        return ()
    try:
        paths = lvm.inactive_volumes(str(chain.top.path), groups)
    except ChainmergeError:
        # What needs LVM will say that it does not work.
        return ()
    return tuple(map(Path, sorted(paths)))
