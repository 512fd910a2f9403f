# SPDX-License-Identifier: Apache-2.0
"""The record of a job: JSON that is read strictly, and never words of a command line.

Whoever can write to the database writes these, so a record can ask for nothing that is not
declared here, whatever the program itself could do: no command, no key file, no other directory,
nothing that gives up data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct, field

from chainmerge.options import DataChoice, DirectionChoice, EngineChoice, VerifyLevel

RECORD_VERSION: Final = 1
LARGEST_RECORD: Final = 64 << 10
"""Bytes of JSON."""

HostName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")]
KeyName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}\Z")]
ImagePath = Annotated[str, Meta(min_length=2, max_length=4096)]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
FLEET_KEY: Final = "fleet"
"""What every job holds: without a limit, unless one is set."""


class RecordUnusable(Exception):
    """A record is not one; says why."""


class Action(StrEnum):
    """What a job does."""

    MERGE = "merge"


class JobDisk(Struct, frozen=True, forbid_unknown_fields=True):
    """A disk to be merged.

    Attributes:
        top: The image merged.
        base: The image merged into.
        base_id: What tells base from all other images, the same as seen from every host.
    """

    top: ImagePath
    base: ImagePath
    base_id: Digest


class JobOptions(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The options of a merge that a job may ask for; see :class:`chainmerge.options.MergeOptions`.

    ``sole_user`` is that of :class:`chainmerge.options.Access`.
    """

    verify: VerifyLevel = "full"
    delete: bool = False
    keep_name: bool = False
    engine: EngineChoice = "auto"
    direction: DirectionChoice = "auto"
    data: DataChoice = "auto"
    detect_zeroes: bool = False
    discard: bool = False
    bandwidth: Annotated[int, Meta(ge=1, le=2**63 - 1)] | None = None
    sole_user: bool = False


class Submission(Struct, frozen=True, forbid_unknown_fields=True):
    """Who submitted a job, and when: ISO 8601, UTC."""

    by: Annotated[str, Meta(max_length=200)]
    at: Annotated[str, Meta(max_length=40)]


class JobFigures(Struct, frozen=True, forbid_unknown_fields=True):
    """What the inventory had of a chain, for people: nobody decides by it. Sizes in bytes.

    Attributes:
        vm: Whose disks they are; None if that is not known.
        images: Of the longest chain.
        hidden_bytes: What merging frees.
        bytes_to_copy: What it copies.
        free_bytes: What is free where the result is written; None if that is not known.
    """

    vm: Annotated[str, Meta(max_length=1024)] | None
    images: int
    hidden_bytes: int
    bytes_to_copy: int
    free_bytes: int | None


class PlannedJob(Struct, frozen=True, forbid_unknown_fields=True):
    """A job as it is planned.

    Attributes:
        v: Version of the record.
        host: Whose worker does it.
        machine_id: Of that host when the job was planned.
        action: What it does.
        disks: Of one virtual machine; one of them in this version.
        keys: What it holds while it runs: the host, the storages, the images merged into.
        options: How to merge.
        plan_digest: Of the plan that was looked at.
        priority: The highest goes first.
        judged_by: Of what the digest is: of the plan, or of the chain as the inventory had it.
        figures: What the inventory had.
    """

    v: Literal[1]
    host: HostName
    machine_id: Digest
    action: Action
    disks: Annotated[tuple[JobDisk, ...], Meta(min_length=1, max_length=1)]
    keys: Annotated[tuple[KeyName, ...], Meta(min_length=2, max_length=64)]
    options: JobOptions
    plan_digest: Digest
    priority: Annotated[int, Meta(ge=-1000, le=1000)] = 0
    judged_by: Literal["plan", "chain"] = "plan"
    figures: JobFigures | None = None

    @property
    def label(self) -> str:
        """The same for two jobs that ask for the same."""
        asked = [self.host, self.action, self.disks, self.options, self.plan_digest]
        return hashlib.sha256(msgspec.json.encode(asked)).hexdigest()[:32]


class JobRecord(PlannedJob, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A job as it lies in the database."""

    submitted: Submission


class LeftOut(Struct, frozen=True, forbid_unknown_fields=True):
    """A chain that no job is planned for.

    Attributes:
        host: Whose it is.
        leaf: The path of its uppermost image; empty for all chains of the host.
        code: Why: the code of an error that would refuse the merge, or a word of the plan's.
        reason: The same, in a sentence.
    """

    host: str
    leaf: str
    code: str
    reason: str


class FleetPlan(Struct, frozen=True, forbid_unknown_fields=True):
    """What ``fleet plan`` prints, and ``fleet submit`` reads.

    Attributes:
        version: Version of this document.
        jobs: In the order in which they are queued.
        limits: How many jobs may hold a key; ``submit`` sets them.
        left_out: Chains that no job is planned for.
        warnings: What whoever submits it should know, a sentence each.
    """

    version: Literal[1]
    jobs: tuple[PlannedJob, ...]
    limits: Mapping[KeyName, Annotated[int, Meta(ge=0, le=100_000)]] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    warnings: tuple[str, ...] = ()


def record_in(arguments: Any) -> JobRecord:
    """Return the record of a row, whatever that holds.

    Raises:
        RecordUnusable: it is anything but a record.
    """
    if not isinstance(arguments, dict) or arguments.keys() != {"record"}:
        raise RecordUnusable("the row does not consist of a record")
    # Back to JSON, as what is strict about types is its reader.
    text = msgspec.json.encode(arguments["record"])
    if len(text) > LARGEST_RECORD:
        raise RecordUnusable(f"the record is larger than {LARGEST_RECORD} bytes")
    try:
        return msgspec.json.decode(text, type=JobRecord)
    except msgspec.DecodeError as error:
        raise RecordUnusable(str(error)) from error


def host_key(host: str) -> str:
    """The key of which a host has as many as it may merge at the same time."""
    return f"host/{host}"


def storage_key(storage: str) -> str:
    """The key of which a storage has as many as it bears."""
    return f"storage/{storage}"


def image_key(base_id: str) -> str:
    """The key of which each image that is merged into has one."""
    return f"image/{base_id}"
