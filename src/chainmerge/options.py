# SPDX-License-Identifier: Apache-2.0
"""What a caller asks for: how images may be reached, and how to merge them.

Kept apart from :mod:`chainmerge.documents.merge` because planning reads the options and the
results contain plans.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import ClassVar, Final, Literal, get_args

from chainmerge.errors import Misuse

VerifyLevel = Literal["full", "metadata"]
EngineChoice = Literal["auto", "native", "qemu"]
DataChoice = Literal["auto", "cow", "in-place"]
DirectionChoice = Literal["auto", "commit", "pull"]
VolumeChoice = Literal["auto", "file", "block", "lvm"]
StallChoice = Literal["wait", "throttle", "abort"]


class Direction(StrEnum):
    """Which way a merge goes. What the guest sees is the same."""

    COMMIT = "commit"
    """What top defines goes down into base, and base is the result."""
    PULL = "pull"
    """What top lacks comes up from base, and top is the result. Base stays what it is."""


class Placement(StrEnum):
    """Where data goes that base has a cluster for already."""

    COW = "cow"
    """To a new cluster: base alone stays what it was until the switch."""
    IN_PLACE = "in-place"
    """Over the old content, which top hides: this takes no second copy."""


LEFT_TO_A_GUEST: Final = 1 << 30
"""Bytes that a volume keeps by default which a guest writes to. Whoever watches it needs the time
to extend it: at a few hundred MiB a second that is seconds, and a guest on a full volume stops."""
ANY_IMAGE: Final = "*"
"""In place of an image's path: all images that nothing else is said of."""


def _nothing_declared() -> Mapping[str, str]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Access:
    """How images may be found and reached; the same for every command.

    An image can come from a hostile guest and names other files. Whatever lies outside
    the directories of the chain is reached only when it is named here.

    Attributes:
        formats: Explicit formats (``"qcow2"``, ``"raw"``, ...) by image path.
        allow_backing: Directories whose files may serve as backing files.
        allow_data_file: External data files that may be used.
        search: Directories that images may lie in which use those of the chain; with everything
            below. What is found nowhere else is then taken for not being there.
        active: The chain's top end, where it is not found by itself.
        lock_wait: Seconds to wait for image locks that others hold.
        sole_user: No image uses those of the chain but the ones that are found.
        activate: Whether the caller has the chain's logical volumes active for as long as this
            takes; who finishes an interrupted merge has to do so too. The command line does it.
    """

    formats: Mapping[str, str] = field(default_factory=_nothing_declared)
    allow_backing: tuple[str, ...] = ()
    allow_data_file: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    active: str | None = None
    lock_wait: float = 10.0
    sole_user: bool = False
    activate: bool = False

    def __post_init__(self) -> None:
        """Raise OptionUnusable for what no option can be."""
        require_paths_to_texts("formats", self.formats)
        require_paths("allow_backing", self.allow_backing)
        require_paths("allow_data_file", self.allow_data_file)
        require_paths("search", self.search)
        if self.active is not None:
            require_path("active", self.active)
        require_seconds("lock_wait", self.lock_wait)


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """How to merge.

    Attributes:
        verify: ``full`` reads back what was copied and compares the guest-visible content of
            base with top's view; ``metadata`` trusts the storage with the copy and checks
            bitmaps and refcounts only.
        delete: Delete the merged images once the result is verified; with them their external
            data files, where nobody else uses those, and the links by which they were reached.
        keep_name: Have the result under the name of top (files only): after a commit base takes
            the place of top's file. Nothing else is deleted without ``delete``.
        drop_bitmaps: Go on where base cannot hold bitmaps and valid ones will be lost.
        drop_snapshots: Delete the internal snapshots that would show other data afterwards, and
            those of images that are deleted.
        despite_newer_base: Go on where the overlays look like ones that somebody has merged
            before and left behind: what was written to base since is overwritten.
        engine: Who writes guest data.
        direction: Whether top goes down into base (``commit``) or what it lacks comes up from
            base (``pull``); ``auto`` pulls where ``keep_name`` makes both end alike and a pull
            moves less.
        data: Where data goes that base has a cluster for: to a new one (``cow``), over the old
            one (``in-place``), or wherever there is the space.
        detect_zeroes: Read all data that moves beforehand, and make zero clusters of what is
            nothing but zeros (native engine, qcow2).
        bandwidth: Limit for the copy in bytes per second; None for no limit.
        size_limit: Bytes that base's file must not grow past, as if it were a volume of
            that size; None for no limit.
        volume: What base lies on; ``auto`` finds out.
        shrink: Reduce a logical volume afterwards to what the merge needed at most, and *leave*.
        leave: Bytes that a reduced volume keeps beyond that; None for ``LEFT_TO_A_GUEST`` where
            the result is what the guest writes to, and for none where images stand on it.
        discard: Discard what was freed on the volume.
        reclaim: Give back all leaked clusters of the image that is written, also those that no
            merge of ours has left. They may be what a lost L2 table led to.
        key_files: Files that hold the passphrases of encrypted images, by image path; that of
            ``ANY_IMAGE`` counts for all others.
    """

    verify: VerifyLevel = "full"
    delete: bool = False
    keep_name: bool = False
    drop_bitmaps: bool = False
    drop_snapshots: bool = False
    despite_newer_base: bool = False
    engine: EngineChoice = "auto"
    direction: DirectionChoice = "auto"
    data: DataChoice = "auto"
    detect_zeroes: bool = False
    bandwidth: int | None = None
    size_limit: int | None = None
    volume: VolumeChoice = "auto"
    shrink: bool = False
    leave: int | None = None
    discard: bool = False
    reclaim: bool = False
    key_files: Mapping[str, str] = field(default_factory=_nothing_declared)

    def __post_init__(self) -> None:
        """Raise OptionUnusable for what no option can be."""
        require_choice("verify", self.verify, get_args(VerifyLevel))
        require_choice("engine", self.engine, get_args(EngineChoice))
        require_choice("direction", self.direction, get_args(DirectionChoice))
        require_choice("data", self.data, get_args(DataChoice))
        require_choice("volume", self.volume, get_args(VolumeChoice))
        for name in ("delete", "keep_name", "drop_bitmaps", "detect_zeroes", "shrink", "discard"):
            require_flag(name, getattr(self, name))
        require_bytes("bandwidth", self.bandwidth)
        require_bytes("size_limit", self.size_limit)
        require_paths_to_texts("key_files", self.key_files)
        for key_file in self.key_files.values():
            require_path("key_files", key_file)


@dataclass(frozen=True, slots=True)
class LiveOptions:
    """How to merge in a running VM.

    Attributes:
        verify: ``full`` also compares the guest-visible content of base with top's view, where
            the guest does not write to base; ``metadata`` trusts QEMU with the copy.
        delete: Delete the merged images once the VM has closed them and all is verified.
        drop_bitmaps: Go on where base cannot hold bitmaps and valid ones will be lost.
        bandwidth: Limit for the copy in bytes per second; None for no limit.
        deadline: Seconds in which the copy is to catch up with what the guest writes; None for
            no limit. What happens then is up to ``on_stall``.
        on_stall: What to do when the copy does not catch up: go on (``wait``), slow down what the
            guest writes until it does (``throttle``), or undo the merge (``abort``).
        size_limit: Bytes that base's file must not grow past; None for no limit.
        volume: What base lies on; ``auto`` finds out.
    """

    verify: VerifyLevel = "full"
    delete: bool = False
    drop_bitmaps: bool = False
    bandwidth: int | None = None
    deadline: float | None = None
    on_stall: StallChoice = "wait"
    size_limit: int | None = None
    volume: VolumeChoice = "auto"

    def __post_init__(self) -> None:
        """Raise OptionUnusable for what no option can be."""
        require_choice("verify", self.verify, get_args(VerifyLevel))
        require_choice("on_stall", self.on_stall, get_args(StallChoice))
        require_choice("volume", self.volume, get_args(VolumeChoice))
        require_flag("delete", self.delete)
        require_flag("drop_bitmaps", self.drop_bitmaps)
        require_bytes("bandwidth", self.bandwidth)
        require_bytes("size_limit", self.size_limit)
        if self.deadline is not None:
            require_seconds("deadline", self.deadline)

    @property
    def as_merge(self) -> MergeOptions:
        """What of it the planning of every merge asks for."""
        return MergeOptions(
            verify=self.verify,
            delete=self.delete,
            drop_bitmaps=self.drop_bitmaps,
            engine="qemu",
            direction="commit",
            bandwidth=self.bandwidth,
            size_limit=self.size_limit,
            volume=self.volume,
        )


LARGEST: Final = 2**63 - 1
"""Bytes: no file and no device is larger (the kernel's ``loff_t``)."""

_SHOWN: Final = 60


@dataclass(eq=False)
class OptionUnusable(Misuse):
    """An option or an argument has a value that it cannot have."""

    code: ClassVar[str] = "option-unusable"
    template: ClassVar[str] = "{option} cannot be {value}: it must be {allowed}"
    hint: ClassVar[str] = "give {option} another value, or leave it out if it is optional"
    explanation: ClassVar[str] = (
        "A value was given that makes no sense: a copy of 0 bytes per second, a path that no file "
        "can have, a choice that does not exist. Nothing was read and nothing was changed."
    )
    option: str
    value: str
    allowed: str


def require_choice(option: str, value: object, choices: Iterable[str]) -> None:
    """Raise OptionUnusable unless *value* is one of *choices*."""
    known = tuple(choices)
    if not (isinstance(value, str) and value in known):
        raise _unusable(option, value, f"one of {', '.join(map(repr, known))}")


def require_flag(option: str, value: object) -> None:
    """Raise OptionUnusable unless *value* is True or False."""
    if not isinstance(value, bool):
        raise _unusable(option, value, "True or False")


def require_integer(option: str, value: object) -> None:
    """Raise OptionUnusable unless *value* is a whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise _unusable(option, value, "a whole number")


def require_bytes(option: str, value: object) -> None:
    """Raise OptionUnusable unless *value* is None or a number of bytes that is not 0."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
        raise _unusable(option, value, f"a whole number of bytes from 1 to {LARGEST}")


def require_seconds(option: str, value: object) -> None:
    """Raise OptionUnusable unless *value* is a finite duration."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:  # type: ignore[arg-type,operator]
        raise _unusable(option, value, "a number of seconds, 0 or more")


def require_text(option: str, value: object) -> None:
    """Raise OptionUnusable unless *value* is a string."""
    if not isinstance(value, str):
        raise _unusable(option, value, "a text")


def require_path(option: str, value: object) -> None:
    """Raise OptionUnusable unless *value* is a path that a file could have."""
    if not isinstance(value, str | os.PathLike):
        raise _unusable(option, value, "a path")
    try:
        name = os.fsencode(value)
    except (TypeError, ValueError):
        raise _unusable(option, value, "a path that the file system's encoding can spell") from None
    if not name or b"\0" in name:
        raise _unusable(option, value, "a path, not empty and without NUL bytes")


def require_paths(option: str, value: object) -> None:
    """Raise OptionUnusable unless *value* is a sequence of paths."""
    if not isinstance(value, list | tuple):
        raise _unusable(option, value, "a sequence of paths")
    for path in value:
        require_path(option, path)


def require_texts(option: str, value: object) -> None:
    """Raise OptionUnusable unless *value* is a sequence of strings."""
    if not isinstance(value, list | tuple):
        raise _unusable(option, value, "a sequence of texts")
    for text in value:
        require_text(option, text)


def require_paths_to_texts(option: str, value: object) -> None:
    """Raise OptionUnusable unless *value* maps paths to strings."""
    if not isinstance(value, Mapping):
        raise _unusable(option, value, "a mapping from paths to texts")
    for path, text in value.items():
        require_path(option, path)
        require_text(option, text)


def require_instance(option: str, value: object, kind: type) -> None:
    """Raise OptionUnusable unless *value* is a *kind*."""
    if not isinstance(value, kind):
        raise _unusable(option, value, f"of the type {kind.__name__}")


def _unusable(option: str, value: object, allowed: str) -> OptionUnusable:
    shown = value if isinstance(value, int | float) else ascii(value)
    text = str(shown)
    return OptionUnusable(option, text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...", allowed)
