# SPDX-License-Identifier: Apache-2.0
"""What a fleet knows of the chains of its hosts: what their last scans have found.

Sizes are in bytes, times in seconds since 1970 (UTC).
"""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from chainmerge.documents.plan import Finding
from chainmerge.documents.trends import TrendPoint


class PlaceKind(StrEnum):
    """What images lie on."""

    FILE_SYSTEM = "file-system"
    VOLUME_GROUP = "volume-group"


class InventoryPlace(Struct, frozen=True):
    """A file system or volume group on which a host has images.

    Attributes:
        kind: Which of the two.
        id: What every host calls it; empty if nothing tells it from that of another host.
        name: The directory or the volume group by which the host's configuration names it.
        storage: The name that the configuration gives it as one that several hosts use.
        locks: Whether what one host writes to is kept from the others, by locks of the file
            system's server or of lvmlockd, or by the site's lock command.
        fleet_only: Whether the configuration says that nothing but this fleet activates its
            volumes.
        free_bytes: What is free; None if it is not known.
    """

    kind: PlaceKind
    id: str
    name: str
    storage: str
    locks: bool
    fleet_only: bool
    free_bytes: int | None


class InventoryChain(Struct, frozen=True):
    """A chain of a host.

    Attributes:
        leaf: The path of its uppermost image.
        base: What its images would be merged into; None if there is nothing to merge.
        base_id: What tells that image from all others, as seen from every host.
        image_ids: The same of all images that a merge of it changes or copies from.
        digest: The same for as long as the chain is what it was; None if it cannot be read.
        images: How many it has; None if it cannot be read.
        virtual_size: Size of the guest's disk.
        occupied_bytes: What its files take.
        freed_bytes: What merging it would free.
        bytes_to_copy: What that would copy.
        stale_bytes: What bitmaps take that no backup can use.
        free_bytes: What is free where the image lies that would be written.
        storages: Names of shared storages that its images lie on, as the host's configuration has
            them.
        places: The file systems and volume groups that its images lie on, by their names.
        unfinished: Whether a merge of its images was not finished.
        in_use: Whether a process has its leaf open.
        domain: The domain of libvirt whose disk it is; None if none is known.
        target: The disk's name there.
        domain_uuid: What tells the domain from all others while it runs; None if it does not.
        problem: Why it cannot be read, or what is wrong with it.
        refusals: Why a merge of it would be refused on its host.
    """

    leaf: str
    base: str | None
    base_id: str | None
    image_ids: tuple[str, ...]
    digest: str | None
    images: int | None
    virtual_size: int | None
    occupied_bytes: int | None
    freed_bytes: int | None
    bytes_to_copy: int | None
    stale_bytes: int
    free_bytes: int | None
    storages: tuple[str, ...]
    places: tuple[str, ...]
    unfinished: bool
    in_use: bool
    domain: str | None
    target: str | None
    domain_uuid: str | None
    problem: str | None
    refusals: tuple[Finding, ...]


class HostInventory(Struct, frozen=True):
    """What a scan of a host has found.

    Attributes:
        version: Version of this document.
        host: Its name in the fleet.
        machine_id: What tells the machine from its clones.
        scanned_at: When the scan began.
        images: How many there are.
        occupied_bytes: What all files take, each counted once.
        freed_bytes: What merging all chains would free.
        places: What images lie on.
        chains: Those whose merge would free most first.
        stale_bytes: What bitmaps take that no backup can use.
        critical: How many findings of the scan are critical.
        left_out: What was not looked at, and why; a sentence each.
    """

    version: int
    host: str
    machine_id: str
    scanned_at: int
    images: int
    occupied_bytes: int
    freed_bytes: int
    places: tuple[InventoryPlace, ...]
    chains: tuple[InventoryChain, ...]
    stale_bytes: int
    critical: int
    left_out: tuple[str, ...]

    @property
    def longest(self) -> int:
        """Images of the longest chain."""
        return max((chain.images or 0 for chain in self.chains), default=0)


class SharedPlace(Struct, frozen=True):
    """A file system or volume group that several hosts report.

    Attributes:
        kind: Which of the two.
        id: What every host calls it.
        hosts: Who reports it.
        names: What each of them calls it, in the same order.
        is_refused: Whether nothing is merged there.
        is_doubtful: Whether somebody should look at it.
        reason: Why, or why not; a sentence.
    """

    kind: PlaceKind
    id: str
    hosts: tuple[str, ...]
    names: tuple[str, ...]
    is_refused: bool
    is_doubtful: bool
    reason: str

    @property
    def sentence(self) -> str:
        """All of it."""
        kind = self.kind.replace("-", " ")
        return f"{', '.join(self.hosts)} share the {kind} {self.id}: {self.reason}"


class HostSummary(Struct, frozen=True):
    """A host, and what its last scan has found; all but its name is None before the first one.

    ``left_out`` is what that scan could not look at, and why; a sentence each.
    """

    host: str
    scanned_at: int | None = None
    chains: int | None = None
    longest: int | None = None
    occupied_bytes: int | None = None
    freed_bytes: int | None = None
    stale_bytes: int | None = None
    unfinished: int | None = None
    refused: int | None = None
    left_out: tuple[str, ...] = ()


class FleetInventory(Struct, frozen=True):
    """What a fleet knows of its hosts.

    Attributes:
        version: Version of this document.
        hosts: All hosts, by name.
        shared: What several of them report.
    """

    version: int
    hosts: tuple[HostSummary, ...]
    shared: tuple[SharedPlace, ...]


class OutcomeCount(Struct, frozen=True):
    """How many jobs ended in a way."""

    outcome: str
    jobs: int


class FleetPictures(Struct, frozen=True):
    """What a report of a fleet is drawn from.

    Attributes:
        version: Version of this document.
        made_at: When it was made.
        hosts: What the last scan of each host has found.
        never_scanned: Hosts without one.
        shared: What several hosts report.
        outcomes: How jobs have ended that are not forgotten.
        trends: What all hosts together had, in the order of time.
    """

    version: int
    made_at: int
    hosts: tuple[HostInventory, ...]
    never_scanned: tuple[str, ...]
    shared: tuple[SharedPlace, ...]
    outcomes: tuple[OutcomeCount, ...]
    trends: tuple[TrendPoint, ...]
