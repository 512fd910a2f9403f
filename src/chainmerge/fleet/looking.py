# SPDX-License-Identifier: Apache-2.0
"""What chains this host has where jobs may touch images, for the inventory. Nothing is written.

What only the host itself can know of a chain is found out here: whether a merge of it would be
refused, what it would have to hold, and by which digest it is known again.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from chainmerge import api
from chainmerge.documents.fleet_inventory import (
    HostInventory,
    InventoryChain,
    InventoryPlace,
    PlaceKind,
)
from chainmerge.documents.plan import Finding
from chainmerge.documents.progress import OnProgress, unheard
from chainmerge.documents.scan import DefinedDisk, Severity
from chainmerge.documents.versions import FLEET_VERSION
from chainmerge.errors import ChainmergeError
from chainmerge.fleet.chain_state import digest_of_idle_chain, digest_of_running_chain
from chainmerge.fleet.digest import images_of_chain
from chainmerge.fleet.errors import FleetPlanUnusable
from chainmerge.fleet.places import base_id_of, keys_of, require_allowed, why_not_locked
from chainmerge.fleet.planned import images_held_by
from chainmerge.fleet.record import JobDisk, RecordUnusable, storages_in
from chainmerge.fleet.settings import HostSettings
from chainmerge.live.libvirt.domains import running_domains
from chainmerge.options import Access, MergeOptions
from chainmerge.storage import lvm
from chainmerge.storage.mounts import mounted_from
from chainmerge.storage.storage_names import storage_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.documents.chains import ChainSummary
    from chainmerge.documents.plan import MergePlan
    from chainmerge.documents.scan import ScanReport

_STALE: Final = frozenset({"unusable-bitmap", "broken-bitmap"})
"""Findings that say how much bitmaps take that no backup can use."""
_LOCKED_BY_SERVER: Final = frozenset({"nfs", "nfs4", "ceph", "gfs2", "lustre", "ocfs2"})
_KNOWN_BY_SOURCE: Final = frozenset({"nfs", "nfs4", "ceph", "cifs", "lustre", "fuse.glusterfs"})
"""File systems that are mounted from what every host calls the same."""
_UUID: Final = "UUID="


class _Sight(Struct, frozen=True):
    """What is known beside a chain's summary.

    Attributes:
        host: Whose it is.
        places: Those of the host.
        parents: Of each image, by path, what it stands on.
        stale: Bytes of useless bitmaps, by the path of their image.
        disks: Of domains, by the real path of their image.
        running: The UUIDs of domains that run, by their names.
    """

    host: HostSettings
    places: tuple[InventoryPlace, ...]
    parents: Mapping[str, str | None]
    stale: Mapping[str, int]
    disks: Mapping[str, DefinedDisk]
    running: Mapping[str, str]


def look(host: HostSettings, on_progress: OnProgress = unheard) -> HostInventory:
    """Find out what chains this host has in the places that its configuration names.

    A place that cannot be looked at is a sentence in what was left out.

    Args:
        host: its configuration.
        on_progress: told how far the scan has come.

    Raises:
        PlaceTooLarge: one of them has too many files.
    """
    left_out: list[str] = []
    places = (*_directories(host, left_out), *_groups(host, left_out))
    # Without a place a scan would take the current directory.
    report = api.scan([place.name for place in places], on_progress=on_progress) if places else None
    if report is None:
        now, nothing = int(time.time()), (0, 0, 0, (), (), 0, 0)
        return HostInventory(
            FLEET_VERSION, host.name, host.machine_id, now, *nothing, tuple(left_out)
        )
    stale = _stale_bytes(report)
    disks, running = _machines(host, left_out)
    sight = _Sight(
        host=host,
        places=places,
        parents={image.path: image.parent for image in report.images},
        stale=stale,
        disks=disks,
        running=running,
    )
    return HostInventory(
        version=FLEET_VERSION,
        host=host.name,
        machine_id=host.machine_id,
        scanned_at=report.scanned_at,
        images=len(report.images),
        occupied_bytes=report.occupied_bytes,
        freed_bytes=report.freed_bytes,
        places=places,
        chains=tuple(_chain(summary, sight) for summary in report.chains),
        stale_bytes=stale.total(),
        critical=report.count_of(Severity.CRITICAL),
        left_out=(*left_out, *report.left_out),
    )


def _directories(host: HostSettings, left_out: list[str]) -> Iterator[InventoryPlace]:
    named = {os.path.realpath(path): name for name, path in host.fleet.storages.items()}
    for directory in host.fleet.directories:
        real = os.path.realpath(directory)
        mounted = mounted_from(real)
        try:
            space = os.statvfs(real)
        except OSError as error:
            left_out.append(f"{directory}: {error.strerror}")
            continue
        kind = mounted.kind if mounted else ""
        name = storage_name(real) or ""
        yield InventoryPlace(
            kind=PlaceKind.FILE_SYSTEM,
            id=name if _UUID in name or kind in _KNOWN_BY_SOURCE else "",
            name=directory,
            storage=next((named[top] for top in _upwards(real) if top in named), ""),
            locks=kind in _LOCKED_BY_SERVER and not why_not_locked(f"{real}/image"),
            fleet_only=False,
            free_bytes=space.f_bavail * space.f_frsize,
        )


def _upwards(path: str) -> Iterator[str]:
    """A directory and all that it is in."""
    yield path
    while path != (path := os.path.dirname(path)):  # noqa: PTH120
        yield path


def _groups(host: HostSettings, left_out: list[str]) -> Iterator[InventoryPlace]:
    for group in host.fleet.volume_groups:
        try:
            sharing = lvm.group_sharing(group)
        except ChainmergeError as error:
            left_out.append(error.sentence)
            continue
        if sharing is None:
            left_out.append(f"there is no volume group {group} with volumes")
            continue
        yield InventoryPlace(
            kind=PlaceKind.VOLUME_GROUP,
            id=sharing.uuid,
            name=group,
            storage="",
            locks=bool(sharing.locking) or host.fleet.lock_command is not None,
            fleet_only=group in host.fleet.fleet_only,
            free_bytes=sharing.free,
        )


def _machines(
    host: HostSettings, left_out: list[str]
) -> tuple[dict[str, DefinedDisk], dict[str, str]]:
    """Disks by the real path of their image, and the UUIDs of domains that run, by their names."""
    if not host.fleet.connect:
        return {}, {}
    try:
        disks = api.domain_disks(host.fleet.connect)
        running = running_domains(host.fleet.connect)
    except ChainmergeError as error:
        left_out.append(f"virtual machines are not known: {error.sentence}")
        return {}, {}
    by_image = {os.path.realpath(disk.path): disk for disk in disks}
    return by_image, {one.name: one.uuid for one in running}


def _stale_bytes(report: ScanReport) -> Counter[str]:
    stale: Counter[str] = Counter()
    for finding in report.findings:
        if finding.code in _STALE:
            stale[finding.image] += finding.evidence.get("stored_bytes", 0)
    return stale


def _chain(summary: ChainSummary, sight: _Sight) -> InventoryChain:
    images = list(_down_from(summary.leaf, sight.parents))
    disk = sight.disks.get(os.path.realpath(summary.leaf))
    in_use = bool(summary.users) or (disk is not None and disk.running)
    places = [place for place in sight.places if any(_lies_on(image, place) for image in images)]
    found = _looked_at(summary, in_use=in_use, host=sight.host)
    written = summary.base or summary.leaf
    return InventoryChain(
        leaf=summary.leaf,
        base=summary.base,
        base_id=found.base_id,
        image_ids=found.image_ids,
        digest=found.digest,
        images=summary.images,
        virtual_size=summary.virtual_size,
        occupied_bytes=summary.occupied_bytes,
        freed_bytes=summary.freed_bytes,
        bytes_to_copy=summary.bytes_to_copy,
        stale_bytes=sum(sight.stale[image] for image in images if image in sight.stale),
        free_bytes=next((one.free_bytes for one in places if _lies_on(written, one)), None),
        storages=found.storages,
        places=tuple(place.name for place in places),
        unfinished=summary.unfinished,
        in_use=in_use,
        domain=disk.domain if disk else None,
        target=disk.target if disk else None,
        domain_uuid=sight.running.get(disk.domain) if disk else None,
        problem=summary.problem,
        refusals=found.refusals,
    )


def _down_from(leaf: str, parents: Mapping[str, str | None]) -> Iterator[str]:
    seen: set[str] = set()
    image: str | None = leaf
    while image is not None and image not in seen:
        seen.add(image)
        yield image
        image = parents.get(image)


def _lies_on(image: str, place: InventoryPlace) -> bool:
    if place.kind is PlaceKind.VOLUME_GROUP:
        return image.startswith(f"/dev/{place.name}/")
    return os.path.realpath(image).startswith(f"{os.path.realpath(place.name).rstrip('/')}/")


class _Looked(Struct, frozen=True):
    """What a plan of a merge says of a chain."""

    base_id: str | None = None
    image_ids: tuple[str, ...] = ()
    digest: str | None = None
    storages: tuple[str, ...] = ()
    refusals: tuple[Finding, ...] = ()


def _looked_at(summary: ChainSummary, *, in_use: bool, host: HostSettings) -> _Looked:
    if summary.base is None:
        return _Looked()
    try:
        # As the worker's child reaches them.
        access = Access(lock_command=host.fleet.lock_command)
        plan = api.plan(summary.leaf, summary.base, access, MergeOptions())
    except ChainmergeError as error:
        return _Looked(refusals=(Finding.of(error),))
    refusals = (*_not_allowed(plan, host), *plan.refusals)
    # Gone in the meantime, or a name that is none: the chain is not known again, and left alone.
    with contextlib.suppress(OSError, ValueError):
        return _known_again(plan, refusals, in_use=in_use, host=host)
    return _Looked(refusals=refusals)


def _known_again(
    plan: MergePlan, refusals: tuple[Finding, ...], *, in_use: bool, host: HostSettings
) -> _Looked:
    base_id = base_id_of(plan.base)
    digest_of = digest_of_running_chain if in_use else digest_of_idle_chain
    keys = keys_of([JobDisk(top=plan.top, base=plan.base, base_id=base_id)], host)
    return _Looked(
        base_id=base_id,
        image_ids=tuple(sorted(set(map(base_id_of, images_held_by(plan))))),
        digest=digest_of(images_of_chain(plan)),
        storages=storages_in(keys),
        refusals=refusals,
    )


def _not_allowed(plan: MergePlan, host: HostSettings) -> Iterator[Finding]:
    for path in (plan.top, plan.base):
        try:
            require_allowed(path, host)
        except RecordUnusable as error:
            yield Finding.of(FleetPlanUnusable(path, str(error)))
