# SPDX-License-Identifier: Apache-2.0
"""The record of a job: JSON that is read strictly, and never words of a command line.

Whoever can write to the database writes these, so a record can ask for nothing that is not
declared here, whatever the program itself could do: no command, no key file, no other directory,
nothing that gives up data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct, field

from chainmerge.documents.fleet_policy import KeyLimit, KeyName
from chainmerge.options import (
    DataChoice,
    DirectionChoice,
    EngineChoice,
    StallChoice,
    VerifyLevel,
)

LARGEST_RECORD: Final = 256 << 10
"""Bytes of JSON."""
MOST_IMAGES: Final = 2000
"""Of all disks of a job together: it holds a key of each."""
MOST_DISKS: Final = 64
"""Of a job."""
_LARGEST_SUBMISSION: Final = 2 << 10
"""Bytes of JSON that a record has beside what was planned."""

HostName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")]
_WITHOUT_NUL: Final = r"^[^\x00]*\Z"
"""What the database takes."""
ImagePath = Annotated[str, Meta(min_length=2, max_length=4096, pattern=_WITHOUT_NUL)]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
DomainName = Annotated[str, Meta(pattern=r"^[^/\x00-\x1f\x7f-]([^/\x00-\x1f\x7f]{0,254})\Z")]
DomainUuid = Annotated[str, Meta(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")]
DiskTarget = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,31}\Z")]
WINDOW_PATTERN: Final = r"^([01][0-9]|2[0-3]):[0-5][0-9]-([01][0-9]|2[0-3]):[0-5][0-9]\Z"
WindowText = Annotated[str, Meta(pattern=WINDOW_PATTERN)]
_Seconds = Annotated[float, Meta(ge=0, le=86400 * 36525)]
_Pattern = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f]{1,255}\Z")]
FLEET_KEY: Final = "fleet"
"""What every job holds: without a limit, unless one is set."""
IMAGE_PREFIX: Final = "image/"


class RecordUnusable(Exception):
    """A record is not one; says why."""


class Action(StrEnum):
    """What a job does."""

    MERGE = "merge"
    LIVE_MERGE = "live-merge"
    PRUNE = "prune"
    THIN_OUT = "thin-out"
    REPAIR = "repair"


class JobDomain(Struct, frozen=True, forbid_unknown_fields=True):
    """The virtual machine whose disks are merged while it runs, as libvirt knows it.

    Attributes:
        name: What it is called.
        uuid: What tells it from all others, on whatever host it runs.
    """

    name: DomainName
    uuid: DomainUuid


class JobDisk(Struct, frozen=True, forbid_unknown_fields=True):
    """A disk that something is done to.

    Attributes:
        top: The image merged; where bitmaps are pruned, the upper end of their chain; where
            snapshots are thinned out, the leaf; the image to be repaired.
        base: The image merged into; where bitmaps are pruned, the lowest that has some; where
            snapshots are thinned out, the lowest image that nothing but the chain uses; again the
            image to be repaired.
        base_id: What tells base from all other images, the same as seen from every host.
        image_ids: The same of all images that are written to, renamed, deleted or copied from, and
            of those that only their chain uses: nobody else may change one of these meanwhile.
        target: What its domain calls the disk, such as ``vda``, where that runs.
    """

    top: ImagePath
    base: ImagePath
    base_id: Digest
    image_ids: Annotated[tuple[Digest, ...], Meta(max_length=MOST_IMAGES)] = ()
    target: DiskTarget | None = None

    @property
    def held_ids(self) -> frozenset[str]:
        """What tells apart the images that a job holds for it."""
        return frozenset({self.base_id, *self.image_ids})


class JobOptions(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The options that a job may ask for; which of them, its action says.

    They are those of :class:`chainmerge.options.MergeOptions`, of
    :class:`chainmerge.options.LiveOptions` (``deadline``, ``on_stall``) and of
    :class:`chainmerge.options.Retention` (``keep_...``). ``sole_user`` is that of
    :class:`chainmerge.options.Access`.
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
    deadline: _Seconds | None = None
    on_stall: StallChoice = "wait"
    keep_last: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
    keep_within: _Seconds | None = None
    keep: Annotated[tuple[_Pattern, ...], Meta(max_length=64)] = ()
    keep_checkpoints: bool = False

    def given(self) -> dict[str, Any]:
        """Those that are not at their default."""
        usual = _USUAL
        return {
            name: value
            for name in self.__struct_fields__
            if (value := getattr(self, name)) != getattr(usual, name)
        }


_USUAL: Final = JobOptions()
_DATA_OPTIONS: Final = frozenset(
    {"verify", "engine", "direction", "data", "detect_zeroes", "discard", "bandwidth", "sole_user"}
)
RETENTION_OPTIONS: Final = frozenset({"keep_last", "keep_within", "keep", "keep_checkpoints"})
_LIVE_OPTIONS: Final = frozenset(
    {"verify", "delete", "direction", "bandwidth", "deadline", "on_stall", "sole_user"}
)
OPTIONS_OF_ACTION: Final[Mapping[Action, frozenset[str]]] = MappingProxyType(
    {
        Action.MERGE: _DATA_OPTIONS | {"delete", "keep_name"},
        Action.LIVE_MERGE: _LIVE_OPTIONS,
        Action.PRUNE: frozenset({"sole_user"}),
        Action.THIN_OUT: _DATA_OPTIONS | RETENTION_OPTIONS,
        Action.REPAIR: frozenset({"sole_user"}),
    }
)
_OF_ONE_DISK: Final = frozenset({Action.PRUNE, Action.THIN_OUT, Action.REPAIR})
_OF_PACE: Final = ("bandwidth", "deadline", "on_stall")


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

    vm: Annotated[str, Meta(max_length=1024, pattern=_WITHOUT_NUL)] | None
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
        disks: Of one virtual machine.
        keys: What it holds while it runs: the host, the storages, the images.
        options: How to do it.
        plan_digest: Of the plan that was looked at.
        priority: The highest goes first.
        domain: Where a virtual machine merges while it runs: which one. The job goes to the host
            that runs it.
        windows: When it may start, by the clock of its host; at any time without one.
        window_end: What becomes of it if it runs when its window ends.
        judged_by: Of what the digest is: of the plan, or of the chain as the inventory had it.
        figures: What the inventory had.
        images_digest: Of the images as they were when the job was planned: what is asked for
            again later, of images that have changed, is another job. None where they could not be
            looked at.
    """

    v: Literal[1]
    host: HostName
    machine_id: Digest
    action: Action
    disks: Annotated[tuple[JobDisk, ...], Meta(min_length=1, max_length=MOST_DISKS)]
    keys: Annotated[tuple[KeyName, ...], Meta(min_length=2, max_length=MOST_IMAGES + 100)]
    options: JobOptions
    plan_digest: Digest
    priority: Annotated[int, Meta(ge=-1000, le=1000)] = 0
    domain: JobDomain | None = None
    windows: Annotated[tuple[WindowText, ...], Meta(max_length=32)] = ()
    window_end: Literal["go-on", "stop"] = "go-on"
    judged_by: Literal["plan", "chain"] = "plan"
    figures: JobFigures | None = None
    images_digest: Digest | None = None

    def __post_init__(self) -> None:
        """Raise ValueError if the action has no such options, or no such disks."""
        for name in sorted(self.options.given().keys() - OPTIONS_OF_ACTION[self.action]):
            raise ValueError(f"{self.action} has no option {name}")
        if self.action in _OF_ONE_DISK and len(self.disks) > 1:
            raise ValueError(f"{self.action} is for one disk")
        if self.action is Action.REPAIR and self.disks[0].top != self.disks[0].base:
            raise ValueError("repair is for one image")
        if self.action is Action.THIN_OUT and not _says_what_stays(self.options):
            raise ValueError("nothing says which snapshots stay")
        of_domain = {self.domain is not None, *(disk.target is not None for disk in self.disks)}
        if of_domain != {self.action is Action.LIVE_MERGE}:
            raise ValueError("a domain and its disks are named for a live-merge, and only there")

    @property
    def label(self) -> str:
        """The same for two jobs that ask for the same, however fast and whenever."""
        what = msgspec.structs.replace(
            self.options, **{name: getattr(_USUAL, name) for name in _OF_PACE}
        )
        digests = (self.plan_digest, self.images_digest)
        asked = [self.host, self.action, self.disks, what, digests]
        return hashlib.sha256(msgspec.json.encode(asked)).hexdigest()[:32]


def _says_what_stays(options: JobOptions) -> bool:
    return options.keep_last is not None or options.keep_within is not None or bool(options.keep)


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
    limits: Mapping[KeyName, KeyLimit] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    warnings: tuple[str, ...] = ()


def read_again(job: PlannedJob) -> PlannedJob:
    """Return a job that was made here, once it is known that its host will take it.

    Only the reader is strict about each field.

    Raises:
        ValueError: no host would.
        msgspec.ValidationError: the same, as a field is not what it may be.
    """
    held = {one for disk in job.disks for one in disk.held_ids}
    advice = ": plan a job for each disk" if len(job.disks) > 1 else ""
    if len(held) > MOST_IMAGES:
        raise ValueError(f"it has {len(held)} images, and a job {MOST_IMAGES} at most{advice}")
    text = msgspec.json.encode(job)
    if len(text) > LARGEST_RECORD - _LARGEST_SUBMISSION:
        raise ValueError(f"as a job it has more than {LARGEST_RECORD} bytes{advice}")
    return msgspec.json.decode(text, type=PlannedJob)


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


def image_key(image_id: str) -> str:
    """The key of which each image that a job changes or copies from has one."""
    return f"{IMAGE_PREFIX}{image_id}"


def keys_needed(host: str, storages: Iterable[str], disks: Iterable[JobDisk]) -> list[str]:
    """What a job for disks on some storages has to hold while it runs, in a fixed order."""
    images = {image_key(one) for disk in disks for one in disk.held_ids}
    return [host_key(host), *sorted(map(storage_key, storages)), *sorted(images)]


def storages_in(keys: Iterable[str]) -> tuple[str, ...]:
    """The storages that keys are for."""
    prefix = storage_key("")
    return tuple(key.removeprefix(prefix) for key in keys if key.startswith(prefix))
