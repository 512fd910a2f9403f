# SPDX-License-Identifier: Apache-2.0
"""What a child is told: the words of a command, made of a record that was checked.

A record has no words itself. Each of its values stands behind an option of ours, or behind ``--``.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from chainmerge.fleet.record import RETENTION_OPTIONS, Action
from chainmerge.options import Access, LiveOptions, MergeOptions, Retention
from chainmerge.records.request import words_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from chainmerge.fleet.record import JobOptions, JobRecord
    from chainmerge.fleet.settings import HostSettings

_COMMANDS: Final[Mapping[Action, tuple[str, ...]]] = MappingProxyType(
    {
        Action.MERGE: ("merge",),
        Action.LIVE_MERGE: ("live", "merge"),
        Action.PRUNE: ("bitmaps", "prune"),
        Action.THIN_OUT: ("thin-out",),
        Action.REPAIR: ("repair", "--yes"),
    }
)
_PLANS: Final[Mapping[Action, tuple[str, ...]]] = MappingProxyType(
    {
        Action.MERGE: ("merge", "--dry-run"),
        Action.LIVE_MERGE: ("live", "plan"),
        # What is pruned follows from what there is.
        Action.PRUNE: ("bitmaps", "list"),
        Action.THIN_OUT: ("thin-out", "--dry-run"),
        Action.REPAIR: ("repair", "--dry-run"),
    }
)
# What a file of the host sets was no part of the plan that was submitted.
_WITHOUT_FILES: Final = "--no-config"
_DONE_WITH_BASES: Final = frozenset({Action.MERGE, Action.LIVE_MERGE, Action.PRUNE})
# A list of bitmaps is that of the whole chain.
_PLANNED_WITH_BASES: Final = _DONE_WITH_BASES - {Action.PRUNE}
_ACCESS_OPTIONS: Final = frozenset({"sole_user"})


def job_words(record: JobRecord, host: HostSettings) -> list[str]:
    """The arguments of ``chainmerge`` that do what a record asks for."""
    return _words(_COMMANDS, _DONE_WITH_BASES, record, host)


def plan_words(record: JobRecord, host: HostSettings) -> list[str]:
    """The arguments of ``chainmerge`` that plan it again."""
    return _words(_PLANS, _PLANNED_WITH_BASES, record, host)


def look_words(host: HostSettings) -> list[str]:
    """The arguments of ``chainmerge`` that look at this host, and store what is found."""
    return [_WITHOUT_FILES, "fleet", "look", "--store", "--json", "--quiet", "--config", host.file]


def job_access(options: JobOptions, host: HostSettings) -> Access:
    """How the images of a job may be reached on a host."""
    asked = {name: value for name, value in options.given().items() if name in _ACCESS_OPTIONS}
    return Access(**asked, lock_command=host.fleet.lock_command or None)


def merge_options_of(options: JobOptions) -> MergeOptions:
    """How a job merges images that nobody has open."""
    return MergeOptions(**_named_in(options, MergeOptions))


def live_options_of(options: JobOptions) -> LiveOptions:
    """How a job has a virtual machine merge."""
    return LiveOptions(**_named_in(options, LiveOptions))


def retention_of(options: JobOptions) -> Retention:
    """Which snapshots stay where a job thins them out."""
    return Retention(**{name: getattr(options, name) for name in RETENTION_OPTIONS})


def _named_in(options: JobOptions, kind: type[LiveOptions | MergeOptions]) -> dict[str, Any]:
    known = kind.__struct_fields__
    return {name: value for name, value in options.given().items() if name in known}


def _words(
    commands: Mapping[Action, tuple[str, ...]],
    with_bases: Collection[Action],
    record: JobRecord,
    host: HostSettings,
) -> list[str]:
    command, options = commands[record.action], _options(record, host)
    bases = [disk.base for disk in record.disks] if record.action in with_bases else []
    named = [word for base in bases for word in ("--base", base)]
    tops = [disk.top for disk in record.disks]
    return [_WITHOUT_FILES, *command, "--json", *options, *named, "--", *tops]


def _options(record: JobRecord, host: HostSettings) -> list[str]:
    options, access = record.options, words_of(job_access(record.options, host))
    match record.action:
        case Action.LIVE_MERGE:
            return [*_domain(record, host), *words_of(live_options_of(options)), *access]
        case Action.MERGE:
            return [*words_of(merge_options_of(options)), *access]
        case Action.THIN_OUT:
            which = words_of(retention_of(options))
            return [*which, *words_of(merge_options_of(options)), *access]
        case Action.PRUNE | Action.REPAIR:
            return access


def _domain(record: JobRecord, host: HostSettings) -> list[str]:
    assert record.domain is not None
    targets = [word for disk in record.disks for word in ("--disk", str(disk.target))]
    return ["--domain", record.domain.name, *targets, "--connect", host.fleet.connect]
