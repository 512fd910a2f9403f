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

A concrete error declares its facts as a dataclass declares its fields. It names a stable
``code``, a ``template`` for its sentence (formatted with the facts), a ``hint``
that says what to do (formatted too), and an ``explanation``, the long form that
``chainmerge explain CODE`` prints. Each package defines the errors it raises in
its own ``errors`` module; the classes find each other through ``__subclasses__``.
"""

from __future__ import annotations

from copy import copy
from enum import IntEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self, dataclass_transform

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class ExitCode(IntEnum):
    """What the process exit status means; part of the stable interface."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 3
    UNKNOWN = 4
    UNFINISHED = 5
    INTERRUPTED = 130


@dataclass_transform(eq_default=False)
class ChainmergeError(Exception):
    """Base of everything that chainmerge raises on purpose.

    Facts are given in the order of their declaration, or by name. No class is a dataclass, which
    would compile methods of its own as it is loaded: there are nearly two hundred, and a command
    raises one at most.
    """

    code: ClassVar[str] = ""
    exit_code: ClassVar[ExitCode] = ExitCode.FAILED
    template: ClassVar[str] = ""
    hint: ClassVar[str] = ""
    explanation: ClassVar[str] = ""
    fact_types: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """The names of the facts, and their types as they are written."""
    may_go_on: ClassVar[bool] = False
    """Whether what was begun has no end yet: a VM or another program may still write."""
    # Class and instance have it, but it is no fact.
    _before_advice = ""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        declared: dict[str, str] = {}
        for base in reversed(cls.__bases__):
            declared |= getattr(base, "fact_types", {})
        for name, kind in cls.__annotations__.items():
            if not kind.startswith("ClassVar"):
                declared[name] = kind
        cls.fact_types = MappingProxyType(declared)

    def __init__(self, *facts: Any, **named: Any) -> None:
        given = dict(zip(self.fact_types, facts, strict=False)) | named
        for name, value in given.items():
            setattr(self, name, value)
        unknown = given.keys() - self.fact_types
        missing = [name for name in self.fact_types if not hasattr(self, name)]
        if unknown or missing or len(given) < len(facts) + len(named):
            wanted = ", ".join(self.fact_types)
            raise TypeError(f"{type(self).__name__}({wanted}) is not made of {facts} and {named}")
        # Exception.args is what pickle and copy rebuild the exception from.
        super().__init__(*self.facts.values())

    @property
    def facts(self) -> dict[str, Any]:
        """The error's facts by name, as they go into JSON reports."""
        return {name: getattr(self, name) for name in self.fact_types}

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


class Failed(ChainmergeError):
    """An operation was attempted and did not work; the sentence says what the disk holds."""

    exit_code: ClassVar[ExitCode] = ExitCode.FAILED


class Misuse(ChainmergeError):
    """The request itself makes no sense."""

    exit_code: ClassVar[ExitCode] = ExitCode.USAGE


class Refused(ChainmergeError):
    """The request was refused before anything was changed."""

    exit_code: ClassVar[ExitCode] = ExitCode.REFUSED


class OutcomeUnknown(ChainmergeError):
    """Nobody can tell whether the operation took effect."""

    may_go_on: ClassVar[bool] = True
    exit_code: ClassVar[ExitCode] = ExitCode.UNKNOWN


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
