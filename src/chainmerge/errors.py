# SPDX-License-Identifier: Apache-2.0
"""The error hierarchy.

::

    ChainmergeError
    ├── Failed          exit 1    something was attempted and did not work
    ├── Misuse          exit 2    the request itself makes no sense
    ├── Refused         exit 3    nothing was changed
    ├── OutcomeUnknown  exit 4    we cannot tell what the disk holds
    └── Interrupted     exit 130  stopped on request; a rerun finishes the job

In addition, an error can belong to a family, which says what it is about: see the end of this
module.

A concrete error is a dataclass whose fields are its facts. It names a stable
``code``, a ``template`` for its sentence (formatted with the facts), a ``hint``
that says what to do (formatted too), and an ``explanation``, the long form that
``chainmerge explain CODE`` prints. Each package defines the errors it raises in
its own ``errors`` module; the classes find each other through ``__subclasses__``.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from collections.abc import Iterator


class ExitCode(IntEnum):
    """What the process exit status means; part of the stable interface."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 3
    UNKNOWN = 4
    INTERRUPTED = 130


@dataclass(eq=False)
class ChainmergeError(Exception):
    """Base of everything that chainmerge raises on purpose."""

    code: ClassVar[str] = ""
    exit_code: ClassVar[ExitCode] = ExitCode.FAILED
    template: ClassVar[str] = ""
    hint: ClassVar[str] = ""
    explanation: ClassVar[str] = ""
    # Class and instance have it, but it is no fact.
    _before_advice = ""

    def __post_init__(self) -> None:
        # Exception.args is what pickle and copy rebuild the exception from.
        self.args = tuple(getattr(self, field.name) for field in fields(self))

    @property
    def facts(self) -> dict[str, Any]:
        """The error's facts by name, as they go into JSON reports."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def sentence(self) -> str:
        """What is wrong, with which image."""
        return self.template.format(**self.facts)

    @property
    def advice(self) -> str:
        """What to do about it."""
        return self._before_advice + self.own_advice

    @property
    def own_advice(self) -> str:
        """The same, without anything put before it."""
        return self.hint.format(**self.facts)

    def advised(self, before: str) -> Self:
        """The same error, whose advice begins with *before*."""
        other = copy(self)
        other._before_advice = before
        return other

    def __str__(self) -> str:
        return self.sentence


@dataclass(eq=False)
class Failed(ChainmergeError):
    """An operation was attempted and did not work; the sentence says what the disk holds."""

    exit_code: ClassVar[ExitCode] = ExitCode.FAILED


@dataclass(eq=False)
class Misuse(ChainmergeError):
    """The request itself makes no sense."""

    exit_code: ClassVar[ExitCode] = ExitCode.USAGE


@dataclass(eq=False)
class Refused(ChainmergeError):
    """The request was refused before anything was changed."""

    exit_code: ClassVar[ExitCode] = ExitCode.REFUSED


@dataclass(eq=False)
class OutcomeUnknown(ChainmergeError):
    """Nobody can tell whether the operation took effect."""

    exit_code: ClassVar[ExitCode] = ExitCode.UNKNOWN


@dataclass(eq=False)
class Interrupted(ChainmergeError):
    """Stopped on request, at a point from which the same command continues."""

    code: ClassVar[str] = "interrupted"
    exit_code: ClassVar[ExitCode] = ExitCode.INTERRUPTED
    template: ClassVar[str] = "interrupted; {state}"
    hint: ClassVar[str] = "run the same command again to finish the job"
    explanation: ClassVar[str] = (
        "The operation was stopped by a signal or by the caller. Images are left in a state "
        "that the same command finishes: the overlay is untouched and still gives the right "
        "content, and saved bitmaps wait beside base."
    )
    state: str


# What callers may want to catch, whatever the exit status is.


class ImageUnavailable(ChainmergeError):
    """An image cannot be opened, or is not the one that was found."""


class UsedByOthers(ChainmergeError):
    """Somebody has an image open, or a job of theirs works on it."""


class NeededByOthers(ChainmergeError):
    """Other images are above one that would change or go, or nobody knows whether any are."""


class ChainUnusable(ChainmergeError):
    """A backing name cannot be followed, or the format of an image is not known."""


class ImageInvalid(ChainmergeError):
    """An image is damaged, or was not closed properly."""


class NoSpace(ChainmergeError):
    """A file, a volume or an image has too little room."""


class RecordsUnusable(ChainmergeError):
    """A file that an earlier run left cannot be read, or cannot be kept."""


class CheckpointsAtRisk(ChainmergeError):
    """A valid checkpoint would be lost, or a broken one would look whole."""


class SnapshotsAtRisk(ChainmergeError):
    """Internal snapshots would show other data, or be lost with their image."""


class NewerDataAtRisk(ChainmergeError):
    """Old data would replace what has been written since, or be taken for it."""


class StorageFailed(ChainmergeError):
    """The operating system, or the storage, has refused a request."""


class NotVerified(ChainmergeError):
    """What was read back is not what was to be written."""


class VmUnavailable(ChainmergeError):
    """A running VM, or one of its disks, cannot be reached."""


def all_errors(root: type[ChainmergeError] = ChainmergeError) -> Iterator[type[ChainmergeError]]:
    """Every concrete error class (one that has a code), in order of definition."""
    # One that belongs to a family is found by two ways.
    found: dict[type[ChainmergeError], None] = {}
    for subclass in root.__subclasses__():
        if subclass.code:
            found[subclass] = None
        found |= dict.fromkeys(all_errors(subclass))
    yield from found
