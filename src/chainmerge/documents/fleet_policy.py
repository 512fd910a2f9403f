# SPDX-License-Identifier: Apache-2.0
"""The policy by which a fleet's plan is made: which chains are merged, when, and how.

It is written by people as TOML: sizes and durations are text, as options have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

from msgspec import Meta, Struct, field

from chainmerge.options import DataChoice, DirectionChoice, EngineChoice, VerifyLevel

SizeText = Annotated[str, Meta(pattern=r"^[0-9]{1,19}([kmgtpeKMGTPE]i?)?[bB]?$")]
DurationText = Annotated[str, Meta(pattern=r"^[0-9]{1,12}[wdhmsWDHMS]$")]
_TIME: Final = "([01][0-9]|2[0-3]):[0-5][0-9]"
_Window = Annotated[str, Meta(pattern=f"^{_TIME}-{_TIME}$")]
Pattern = Annotated[str, Meta(min_length=1, max_length=4096)]
KEY_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}\Z"
KeyName = Annotated[str, Meta(pattern=KEY_PATTERN)]
LARGEST_LIMIT: Final = 100_000
KeyLimit = Annotated[int, Meta(ge=0, le=LARGEST_LIMIT)]
_Count = Annotated[int, Meta(ge=0)]


class PolicyRetention(Struct, frozen=True, forbid_unknown_fields=True):
    """Which snapshots of a chain stay, as the options of ``thin-out``.

    Attributes:
        keep_last: This many, the uppermost ones; 0 for none.
        keep_within: Those that are not older, such as ``7d``.
        keep: Those whose image has a file name like one of these patterns.
        keep_checkpoints: Besides these, those at which a checkpoint begins that backups can use.
    """

    keep_last: _Count | None = None
    keep_within: DurationText | None = None
    keep: tuple[Pattern, ...] = ()
    keep_checkpoints: bool = False


class PolicyMerging(Struct, frozen=True, forbid_unknown_fields=True):
    """How to merge, as the options of ``merge``.

    Attributes:
        verify: How much to verify afterwards.
        delete: Delete the merged images.
        keep_name: Give the result the name of the uppermost image.
        engine: Which engine writes the data.
        direction: Which way the data moves.
        data: Where data goes if base has a cluster for it.
        detect_zeroes: Turn zeros into zero clusters.
        discard: Discard what was freed on a volume.
    """

    verify: VerifyLevel = "full"
    delete: bool = False
    keep_name: bool = False
    engine: EngineChoice = "auto"
    direction: DirectionChoice = "auto"
    data: DataChoice = "auto"
    detect_zeroes: bool = False
    discard: bool = False


class PolicyExceptions(Struct, frozen=True, forbid_unknown_fields=True):
    """What is left alone, by patterns as a shell matches them.

    Attributes:
        hosts: By the name of the host.
        images: By the path of the uppermost image; a ``*`` stands for slashes, too.
        vms: By the name of the virtual machine.
    """

    hosts: tuple[Pattern, ...] = ()
    images: tuple[Pattern, ...] = ()
    vms: tuple[Pattern, ...] = ()


class FleetPolicy(Struct, frozen=True, forbid_unknown_fields=True):
    """Which chains of a fleet are merged, when, and how.

    Attributes:
        least_images: Chains with fewer images are left alone.
        least_freed: So are those whose merge frees less, such as ``1G``.
        most_jobs: So many jobs are planned at most; those that come first.
        running: What becomes of chains whose virtual machine runs: they are left alone, or it
            merges them itself while it runs, wherever it is by then.
        retention: Which snapshots stay; without it all are merged that only one leaf uses.
        merging: How to merge.
        leave_alone: What is not touched.
        limits: How many jobs may hold a key at the same time: ``host/NAME``, ``storage/NAME``,
            ``fleet``.
        bandwidth: Bytes per second that a job may copy, such as ``100M``, by the name of a shared
            storage; ``default`` is for all others.
        windows: When jobs may start, such as ``22:00-05:00``, by the clock of their host; without
            one at any time.
        window_end: What becomes of a job that runs when its window ends: it goes on, or it stops
            at the next safe point and goes on in the next window.
    """

    least_images: Annotated[int, Meta(ge=2)] = 2
    least_freed: SizeText = "0"
    most_jobs: Annotated[int, Meta(ge=1)] | None = None
    running: Literal["leave-alone", "merge"] = "leave-alone"
    retention: PolicyRetention | None = None
    merging: PolicyMerging = PolicyMerging()
    leave_alone: PolicyExceptions = PolicyExceptions()
    limits: Mapping[KeyName, KeyLimit] = field(default_factory=dict)
    bandwidth: Mapping[str, SizeText] = field(default_factory=dict)
    windows: tuple[_Window, ...] = ()
    window_end: Literal["go-on", "stop"] = "go-on"
