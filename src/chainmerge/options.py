# SPDX-License-Identifier: Apache-2.0
"""What a caller requests: how images may be reached, and how to merge them.

Kept apart from :mod:`chainmerge.documents.merge` because planning reads the options and the
results contain plans.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from functools import partial
from types import MappingProxyType
from typing import ClassVar, Final, Literal, TypeAlias, get_args

from msgspec import Struct, field

from chainmerge.errors import Misuse

VerifyLevel = Literal["full", "metadata"]
EngineChoice = Literal["auto", "native", "qemu"]
DataChoice = Literal["auto", "cow", "in-place"]
DirectionChoice = Literal["auto", "commit", "pull"]
VolumeChoice = Literal["auto", "file", "block", "lvm"]
StallChoice = Literal["wait", "throttle", "abort"]
# Known by these names to what checks values by their annotations.
FileName: TypeAlias = str
CommandLine: TypeAlias = str
Seconds: TypeAlias = float
ByteCount: TypeAlias = int
Count: TypeAlias = int
Percentage: TypeAlias = int
Threshold: TypeAlias = int


class Direction(StrEnum):
    """Which way a merge goes. What the guest sees is the same."""

    COMMIT = "commit"
    """What top defines goes down into base, and base is the result."""
    PULL = "pull"
    """What top lacks comes up from base, and top is the result. Base stays what it is."""


class Placement(StrEnum):
    """Where data goes if base already has a cluster for it."""

    COW = "cow"
    """To a new cluster: base alone stays what it was until the switch."""
    IN_PLACE = "in-place"
    """Over the old content, which top hides: this takes no second copy."""


LEFT_TO_A_GUEST: Final = 1 << 30
"""Bytes that a volume keeps by default if a guest writes to it. Whoever monitors it needs time to
extend it: at a few hundred MiB a second that is seconds, and a guest on a full volume stops."""
ANY_IMAGE: Final = "*"
"""In place of an image's path: all images without an entry of their own."""


def _nothing_declared() -> Mapping[str, str]:
    return MappingProxyType({})


class Access(Struct, frozen=True):
    """How images may be found and reached; the same for every command.

    An image can come from a hostile guest and names other files. Whatever lies outside
    the directories of the chain is reached only when it is named here.

    Attributes:
        formats: Explicit formats (``"qcow2"``, ``"raw"``, ...) by image path.
        allow_backing: Directories whose files may serve as backing files.
        allow_data_file: External data files that may be used.
        search: Directories that may hold, at any depth, other images that use those of the chain.
            Images that are not found there are then taken not to exist.
        active: The chain's active layer, if it is not found automatically.
        lock_wait: Seconds to wait for image locks that others hold.
        sole_user: Only the images that are found use those of the chain; nobody else does.
        activate: Whether the caller has the chain's logical volumes active for as long as this
            takes; so must whoever finishes an interrupted merge. The command line does it.
        lock_command: A program, with words separated as a shell does, that locks volumes for this
            host: run with ``lock`` or ``unlock`` and the block devices that are written to. It is
            believed more than LVM. To lock again what this host has locked must do no harm, as
            whoever finishes an interrupted merge does that.
    """

    formats: Mapping[str, str] = field(default_factory=_nothing_declared)
    allow_backing: tuple[str, ...] = ()
    allow_data_file: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    active: FileName | None = None
    lock_wait: Seconds = 10.0
    sole_user: bool = False
    activate: bool = False
    lock_command: CommandLine | None = None

    def __post_init__(self) -> None:
        """Raise OptionUnusable if an option has an impossible value."""
        _require_fitting_fields(self)


class MergeOptions(Struct, frozen=True):
    """How to merge.

    Attributes:
        verify: ``full`` reads back what was copied and compares the guest-visible content of
            base with top's view; ``metadata`` trusts the storage with the copy and checks
            bitmaps and refcounts only.
        delete: Delete the merged images once the result is verified; with them their external
            data files, if nobody else uses those, and the links by which they were reached.
        keep_name: Give the result the name of top: after a commit base takes the place of top's
            file, or top's logical volume is removed and base's renamed. Nothing else is deleted
            without ``delete``.
        drop_bitmaps: Go on even if base cannot hold bitmaps and valid ones will be lost.
        drop_snapshots: Delete the internal snapshots that would show other data afterwards, and
            those of images that are deleted.
        despite_newer_base: Go on even if the overlays look as if somebody has merged them before
            and left them behind: what was written to base since is overwritten.
        engine: Which engine writes guest data.
        direction: Whether top goes down into base (``commit``) or what it lacks comes up from
            base (``pull``); ``auto`` pulls if ``keep_name`` gives both the same result and a pull
            moves less.
        data: Where data goes if base already has a cluster for it: to a new one (``cow``), over the
            old one (``in-place``), or to a new one if there is space (``auto``).
        detect_zeroes: Read all data that moves beforehand, and turn zeros into zero clusters
            (native engine, qcow2).
        bandwidth: Limit for the copy in bytes per second; None for no limit.
        size_limit: Bytes that base's file must not grow past, as if it were a volume of
            that size; None for no limit.
        volume: What kind of volume base lies on; ``auto`` finds out.
        extend_pool: Extend the pool of a thin volume beforehand if it may not have what the merge
            writes.
        shrink: Reduce a logical volume afterwards to what the merge needed at most, and *leave*.
        leave: Bytes that a reduced volume keeps beyond that; None for ``LEFT_TO_A_GUEST`` if the
            guest writes to the result, and for none if images are above it.
        discard: Discard what was freed on the volume.
        reclaim: Give back all leaked clusters of the image that is written, also those that no
            merge of ours has left. They may hold the data that a lost L2 table mapped.
        key_files: Files that hold the passphrases of encrypted images, by image path; that of
            ``ANY_IMAGE`` applies to all others.
        history: Whether this host's history tells how long the merge will take, and keeps a line
            about it.
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
    bandwidth: ByteCount | None = None
    size_limit: ByteCount | None = None
    volume: VolumeChoice = "auto"
    extend_pool: bool = False
    shrink: bool = False
    leave: int | None = None
    discard: bool = False
    reclaim: bool = False
    key_files: Mapping[str, str] = field(default_factory=_nothing_declared)
    history: bool = True

    def __post_init__(self) -> None:
        """Raise OptionUnusable if an option has an impossible value."""
        if self.leave is not None and self.leave != 0:
            require_bytes("leave", self.leave)
        _require_fitting_fields(self)
        for key_file in self.key_files.values():
            require_path("key_files", key_file)


class LiveOptions(Struct, frozen=True):
    """How to merge in a running VM.

    Attributes:
        verify: ``full`` also compares the guest-visible content of base with top's view, if the
            guest does not write to base; ``metadata`` trusts QEMU with the copy.
        delete: Delete the merged images once the VM has closed them and all is verified.
        drop_bitmaps: Go on even if base cannot hold bitmaps and valid ones will be lost.
        direction: Whether top goes down into base (``commit``) or what it lacks comes up from
            base (``pull``); ``auto`` is ``commit``.
        bandwidth: Limit for the copy in bytes per second; None for no limit.
        deadline: Seconds in which the copy is to catch up with what the guest writes; None for
            no limit. What happens then is up to ``on_stall``.
        on_stall: What to do when the copy does not catch up: go on (``wait``), slow down what the
            guest writes until it does (``throttle``), or undo the merge (``abort``).
        size_limit: Bytes that base's file must not grow past; None for no limit.
        volume: What kind of volume base lies on; ``auto`` finds out.
        extend_pool: Extend the pool of a thin volume beforehand if it may not have what the merge
            writes.
        history: Whether this host's history keeps a line about the merge.
    """

    verify: VerifyLevel = "full"
    delete: bool = False
    drop_bitmaps: bool = False
    direction: DirectionChoice = "auto"
    bandwidth: ByteCount | None = None
    deadline: Seconds | None = None
    on_stall: StallChoice = "wait"
    size_limit: ByteCount | None = None
    volume: VolumeChoice = "auto"
    extend_pool: bool = False
    history: bool = True

    def __post_init__(self) -> None:
        """Raise OptionUnusable if an option has an impossible value."""
        _require_fitting_fields(self)

    @property
    def pulls(self) -> bool:
        """Whether data goes up into top."""
        return self.direction == "pull"

    @property
    def as_merge(self) -> MergeOptions:
        """The options that the planning of every merge needs."""
        return MergeOptions(
            verify=self.verify,
            delete=self.delete,
            drop_bitmaps=self.drop_bitmaps,
            engine="qemu",
            direction="pull" if self.pulls else "commit",
            bandwidth=self.bandwidth,
            size_limit=self.size_limit,
            volume=self.volume,
            extend_pool=self.extend_pool,
            history=self.history,
        )


class ScanOptions(Struct, frozen=True):
    """Where a scan looks, and from when on it says something.

    Attributes:
        one_file_system: Whether directories on other file systems than the place itself are left
            out. Pseudo file systems always are.
        check: Whether the refcounts of every image that nobody has open are checked, as ``check``
            does: for leaks and damage that nothing else shows. It reads all tables.
        cache: Whether what is known of images that have not changed since the last scan is used,
            and kept for the next one.
        history: Whether this host's history keeps a line about the scan, and tells when chains and
            storage reach their limits.
        length_info: Images in a chain from which it is long. libvirt before 12.0 does not start
            a domain with 25.
        length_warning: Images from which it is too long.
        length_critical: Images from which it has to be merged soon.
        length_limit: Images from which libvirt refuses the next snapshot.
        old_days: Days since a base was written last, from which its overlay is an old one.
        hidden: Bytes that a merge would free, from which it is worth while.
        free_warning: Percent of a file system or volume that have to be free, if images on it may
            grow beyond.
        free_critical: As ``free_warning``, below which it is critical.
    """

    one_file_system: bool = True
    check: bool = False
    cache: bool = True
    history: bool = True
    length_info: Threshold = 25
    length_warning: Threshold = 30
    length_critical: Threshold = 100
    length_limit: Threshold = 200
    old_days: Threshold = 30
    hidden: ByteCount = 1 << 30
    free_warning: Percentage = 10
    free_critical: Percentage = 2

    def __post_init__(self) -> None:
        """Raise OptionUnusable if an option has an impossible value."""
        _require_fitting_fields(self)


class Retention(Struct, frozen=True):
    """Which snapshots of a chain stay: those that any of the rules keeps.

    Attributes:
        keep_last: this many, the uppermost ones; 0 for none.
        keep_within: those that are not older than this, in seconds.
        keep: those whose image has a file name like one of these patterns, as a shell matches them
            (``daily-*``).
        keep_checkpoints: besides these, those at which a checkpoint begins that backups can use.
    """

    keep_last: Count | None = None
    keep_within: Seconds | None = None
    keep: tuple[str, ...] = ()
    keep_checkpoints: bool = False

    def __post_init__(self) -> None:
        """Raise NoRetentionRule, or OptionUnusable if a rule has an impossible value."""
        _require_fitting_fields(self)
        if self.keep_last is None and self.keep_within is None and not self.keep:
            raise NoRetentionRule


def _require_fitting_fields(
    options: Access | MergeOptions | LiveOptions | ScanOptions | Retention,
) -> None:
    for name, kind in type(options).__annotations__.items():
        require_fitting(name, getattr(options, name), kind)


LARGEST: Final = 2**63 - 1
"""Bytes: no file and no device is larger (the kernel's ``loff_t``)."""

_SHOWN: Final = 60


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


class NoRetentionRule(Misuse):
    """Snapshots were to be thinned out, and nothing says which of them stay."""

    code: ClassVar[str] = "no-retention-rule"
    template: ClassVar[str] = "nothing says which snapshots stay"
    hint: ClassVar[str] = "give at least one of --keep-last, --keep-within and --keep"
    explanation: ClassVar[str] = (
        "Thinning out keeps the snapshots that a rule keeps and merges the others away, so without "
        "a rule it would merge all of them. Nothing was read and nothing was changed."
    )


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


def require_count(option: str, value: object) -> None:
    """Raise OptionUnusable unless *value* is a whole number, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _unusable(option, value, "a whole number, 0 or more")


def require_bytes(option: str, value: object) -> None:
    """Raise OptionUnusable unless *value* is a number of bytes that is not 0."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
        raise _unusable(option, value, f"a whole number of bytes from 1 to {LARGEST}")


def require_threshold(option: str, value: object) -> None:
    """Raise OptionUnusable unless *value* is a whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
        raise _unusable(option, value, "a whole number from 1 on")


def require_percentage(option: str, value: object) -> None:
    """Raise OptionUnusable unless *value* is a whole number of percents."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 100:
        raise _unusable(option, value, "a whole number from 0 to 100")


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


def require_command_line(option: str, value: object) -> None:
    """Raise OptionUnusable unless *value* is a program, with words for it, as a shell reads them.

    The program is named by its path, or found on PATH, wherever the command is run again.
    """
    require_text(option, value)
    assert isinstance(value, str)
    try:
        words = shlex.split(value)
    except ValueError as error:
        raise _unusable(option, value, f"a command line ({error})") from None
    if not words or "\0" in value:
        raise _unusable(option, value, "a command line, not empty and without NUL bytes")
    if "/" in words[0] and not words[0].startswith("/"):
        raise _unusable(option, value, "a command line that begins with an absolute path or a name")


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


_OR_NONE: Final = " | None"
# By the annotation, which is text: everything of ours postpones the evaluation of annotations.
_CHECKS: Final[Mapping[str, Callable[[str, object], None]]] = MappingProxyType(
    {
        "bool": require_flag,
        "int": require_integer,
        "ByteCount": require_bytes,
        "Count": require_count,
        "Percentage": require_percentage,
        "Threshold": require_threshold,
        "Seconds": require_seconds,
        "str": require_text,
        "Sequence[str]": require_texts,
        "FileName": require_path,
        "CommandLine": require_command_line,
        "str | Path": require_path,
        "Sequence[str | Path]": require_paths,
        "tuple[str, ...]": require_paths,
        "Mapping[str, str]": require_paths_to_texts,
        "VerifyLevel": partial(require_choice, choices=get_args(VerifyLevel)),
        "EngineChoice": partial(require_choice, choices=get_args(EngineChoice)),
        "DataChoice": partial(require_choice, choices=get_args(DataChoice)),
        "DirectionChoice": partial(require_choice, choices=get_args(DirectionChoice)),
        "VolumeChoice": partial(require_choice, choices=get_args(VolumeChoice)),
        "StallChoice": partial(require_choice, choices=get_args(StallChoice)),
        "Access": partial(require_instance, kind=Access),
        "MergeOptions": partial(require_instance, kind=MergeOptions),
        "LiveOptions": partial(require_instance, kind=LiveOptions),
        "ScanOptions": partial(require_instance, kind=ScanOptions),
        "Retention": partial(require_instance, kind=Retention),
    }
)


def require_fitting(option: str, value: object, annotation: str) -> None:
    """Raise OptionUnusable unless *value* is what *annotation* says, as far as that is known."""
    if value is None and annotation.endswith(_OR_NONE):
        return
    check = _CHECKS.get(annotation.removesuffix(_OR_NONE))
    if check is not None:
        check(option, value)


def _unusable(option: str, value: object, allowed: str) -> OptionUnusable:
    shown = value if isinstance(value, int | float) else ascii(value)
    text = str(shown)
    return OptionUnusable(option, text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...", allowed)
