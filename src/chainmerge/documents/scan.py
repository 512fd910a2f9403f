# SPDX-License-Identifier: Apache-2.0
"""All images and chains that were found in some places, and what is wrong with them."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from chainmerge.documents.chains import ChainSummary
from chainmerge.documents.images import ImageUser
from chainmerge.documents.trends import Forecast


class Severity(StrEnum):
    """How much a finding matters."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        """0 for the least; more for what matters more."""
        return list(Severity).index(self)


class DefinedDisk(Struct, frozen=True):
    """A disk of a domain of libvirt.

    Attributes:
        domain: The domain's name.
        target: The disk's name in it, such as ``vda``.
        path: The active image, as the domain's description has it.
        running: Whether the domain runs.
    """

    domain: str
    target: str
    path: str
    running: bool


class ScanFinding(Struct, frozen=True):
    """Something that somebody should know of an image.

    Attributes:
        code: What it is; ``explain`` has the long form.
        severity: ``info`` (has innocent reasons, or costs only space), ``warning`` (will be in
            the way of a backup, a merge or a VM) or ``critical`` (data is lost, or about to be).
        image: The path of the image that it is about.
        sentence: What is wrong.
        evidence: The figures that show it, by name.
        command: What mends it, or shows more of it; for a shell. None if nothing of ours does.
    """

    code: str
    severity: Severity
    image: str
    sentence: str
    evidence: dict[str, int]
    command: str | None


class ScannedBitmap(Struct, frozen=True):
    """A bitmap as an image stores it.

    Attributes:
        name: The bitmap's name.
        state: ``valid``, ``disabled`` or ``in-use``.
        granularity: Guest bytes that one bit stands for.
        stored_bytes: What its table and its bits take in the image.
        tombstone: Whether the name only keeps images above from passing the chain test.
    """

    name: str
    state: str
    granularity: int
    stored_bytes: int
    tombstone: bool


class ScannedImage(Struct, frozen=True):
    """An image that was found.

    Attributes:
        path: Its absolute path.
        format: ``qcow2``, ``raw``, or the format that an image above declares.
        virtual_size: Size of the guest's disk in bytes; None if that is not known.
        file_size: Size of the file or device in bytes.
        occupied_bytes: What it takes of its file system; None for a device.
        written_at: When it was written last, in seconds since 1970 (UTC); None for a device.
        backing: The backing name in its header; None for a root.
        parent: The path of the image that this leads to; None if it leads to none that was found.
        children: How many of the images that were found have it as their backing file.
        depth: The number of images from its root up to itself; None if no root was found below it.
        bitmaps: Those that it stores, by name.
        snapshots: The number of its internal snapshots.
        users: The processes that have it open; None if that is not known.
        may_be_stale: Whether a process has it open, so that what was read may be half written.
        problem: Why it cannot be read, in a sentence; None if it can.
    """

    path: str
    format: str
    virtual_size: int | None
    file_size: int
    occupied_bytes: int | None
    written_at: int | None
    backing: str | None
    parent: str | None
    children: int
    depth: int | None
    bitmaps: tuple[ScannedBitmap, ...]
    snapshots: int
    users: tuple[ImageUser, ...] | None
    may_be_stale: bool
    problem: str | None


class ScanReport(Struct, frozen=True):
    """All images and chains that were found in some places.

    Attributes:
        version: Version of this document.
        scanned_at: When the scan began, in seconds since 1970 (UTC).
        places: Where was looked, as absolute paths; volume groups by their names.
        images: Every image, by path.
        chains: A summary for each image that no other one stands on: those whose merge would free
            most first, those that cannot be read last.
        findings: The most severe first.
        occupied_bytes: What all files take, each counted once.
        freed_bytes: What merging all chains would free.
        left_out: What was not looked at, and why; a sentence each.
        forecasts: What reaches its limit within a year, if it goes on as it did from scan to scan;
            the first comes first.
        scope: What tells that two scans are of the same places: as ``places``, but ``libvirt``
            for the disks of its domains, of which snapshots change the paths.
    """

    version: int
    scanned_at: int
    places: tuple[str, ...]
    images: tuple[ScannedImage, ...]
    chains: tuple[ChainSummary, ...]
    findings: tuple[ScanFinding, ...]
    occupied_bytes: int
    freed_bytes: int
    left_out: tuple[str, ...]
    forecasts: tuple[Forecast, ...] = ()
    scope: tuple[str, ...] = ()

    def count_of(self, severity: Severity) -> int:
        """How many findings are of this severity."""
        return sum(finding.severity is severity for finding in self.findings)

    def has_at_least(self, severity: Severity) -> bool:
        """Whether a finding is of this severity, or of a higher one."""
        return any(finding.severity.rank >= severity.rank for finding in self.findings)
