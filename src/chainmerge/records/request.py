# SPDX-License-Identifier: Apache-2.0
"""A request as it is recorded, and the command that repeats it.

This is the only place that composes a command for a merge. The command repeats everything that was
given: a merge that goes on with other options can go another way, or be refused. What was left at
its default is neither recorded nor said. Paths are made absolute when they are recorded, so that a
command can be run from anywhere; block devices are named by what stays theirs after the next boot.
"""

from __future__ import annotations

import math
import os
import shlex
import stat
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct

from chainmerge.arithmetic.durations import spelled_duration
from chainmerge.errors import Misuse
from chainmerge.options import ANY_IMAGE, Access, LiveOptions, MergeOptions, Retention
from chainmerge.records.doing import Doer, this_process

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


class RecordedRequest(msgspec.Struct, frozen=True):
    """A merge that was requested.

    ``tops`` and ``bases`` are those of all disks that are merged together. ``access`` and
    ``options`` have the fields of :class:`Access` and of :class:`MergeOptions` that are not at
    their default. Of a live merge they have those of :class:`LiveOptions`, and ``address`` the
    options of ``chainmerge live`` that lead to the disk. Where snapshots are thinned out, ``tops``
    has the leaf, ``bases`` nothing, and ``retention`` the fields of :class:`Retention`. ``by`` is
    the process that was asked, where that is recorded.
    """

    tops: list[str]
    bases: list[str]
    access: dict[str, Any]
    options: dict[str, Any]
    address: list[str] = []
    by: Doer | None = None
    retention: dict[str, Any] = {}

    @property
    def is_live(self) -> bool:
        """Whether a running VM was to merge."""
        return bool(self.address)


class _Paths(Enum):
    """What of an option's value is the name of a file."""

    NONE = "none"
    VALUE = "the value, or each of them"
    KEY = "what stands before the equals sign"
    BOTH = "what stands before the equals sign, and what stands behind it"


class Spelling(Struct, frozen=True):
    """How a field is said on the command line. Its value tells whether it is a flag, or a list."""

    option: str
    paths: _Paths = _Paths.NONE


SPELLINGS: Final[Mapping[str, Spelling]] = MappingProxyType(
    {
        # Access
        "formats": Spelling("--format", _Paths.KEY),
        "allow_backing": Spelling("--allow-backing", _Paths.VALUE),
        "allow_data_file": Spelling("--allow-data-file", _Paths.VALUE),
        "search": Spelling("--search", _Paths.VALUE),
        "active": Spelling("--active", _Paths.VALUE),
        "lock_wait": Spelling("--lock-wait"),
        "activate": Spelling("--activate"),
        "sole_user": Spelling("--sole-user"),
        "lock_command": Spelling("--lock-command"),
        # MergeOptions and LiveOptions
        "verify": Spelling("--verify"),
        "delete": Spelling("--delete"),
        "keep_name": Spelling("--keep-name"),
        "drop_bitmaps": Spelling("--drop-bitmaps"),
        "drop_snapshots": Spelling("--drop-snapshots"),
        "despite_newer_base": Spelling("--despite-newer-base"),
        "reclaim": Spelling("--reclaim"),
        "engine": Spelling("--engine"),
        "direction": Spelling("--direction"),
        "data": Spelling("--data"),
        "detect_zeroes": Spelling("--detect-zeroes"),
        "bandwidth": Spelling("--bandwidth"),
        "deadline": Spelling("--deadline"),
        "on_stall": Spelling("--on-stall"),
        "size_limit": Spelling("--size-limit"),
        "volume": Spelling("--volume"),
        "extend_pool": Spelling("--extend-pool"),
        "shrink": Spelling("--shrink"),
        "leave": Spelling("--leave"),
        "discard": Spelling("--discard"),
        "key_files": Spelling("--key-file", _Paths.BOTH),
        "history": Spelling("--no-history"),
        # Retention
        "keep_last": Spelling("--keep-last"),
        "keep_within": Spelling("--keep-within"),
        "keep": Spelling("--keep"),
        "keep_checkpoints": Spelling("--keep-checkpoints"),
    }
)
"""How each field of :class:`Access`, :class:`MergeOptions`, :class:`LiveOptions` and
:class:`Retention` is said."""

_OF_RESUME: Final = frozenset(
    {"bandwidth", "deadline", "on_stall", "volume", "lock_command", "history"}
)
"""What ``chainmerge live resume`` is told again. The journal knows the rest."""


def recorded(
    tops: Sequence[str | Path],
    bases: Sequence[str | Path],
    access: Access,
    options: MergeOptions | LiveOptions,
    address: Sequence[str] = (),
) -> RecordedRequest:
    """A request as it is recorded."""
    return RecordedRequest(
        tops=[lasting_name(top) for top in tops],
        bases=[lasting_name(base) for base in bases],
        access=dict(_said(access)),
        options=dict(_said(options)),
        address=list(_lasting_address(address)),
        by=this_process(),
    )


def recorded_thinning(
    leaf: str | Path, retention: Retention, access: Access, options: MergeOptions
) -> RecordedRequest:
    """A request to thin out the snapshots below *leaf*, as it is recorded.

    Parts of a second, which no command can say, are recorded as a whole one.
    """
    if retention.keep_within is not None:
        retention = msgspec.structs.replace(retention, keep_within=math.ceil(retention.keep_within))
    said = dict(_said(retention))
    return msgspec.structs.replace(recorded([leaf], [], access, options), retention=said)


def access_of(request: RecordedRequest) -> Access | None:
    """How images may be reached; None if the record has what is not known here."""
    access: Access | None = _filled_in(Access, request.access)
    return access


def options_of(request: RecordedRequest) -> MergeOptions | None:
    """How to merge, cold; None if the record has what is not known here."""
    said = request.options
    if request.is_live:
        if _filled_in(LiveOptions, said) is None:
            return None
        said = {
            name: value for name, value in said.items() if name in MergeOptions.__struct_fields__
        }
    options: MergeOptions | None = _filled_in(MergeOptions, said)
    return options


def command_of(request: RecordedRequest) -> str | None:
    """What asks for the same merge, cold, as one types it into a shell.

    Of a live merge it is what finishes it while the VM does not run. None if the record has
    what is not known here.
    """
    access, options = access_of(request), options_of(request)
    if access is None or options is None:
        return None
    if request.retention:
        return _thinning_command(request, access, options)
    words = ["merge", *words_of(options), *words_of(access), *_images(request)]
    return shell_line(["chainmerge", *words])


def _thinning_command(
    request: RecordedRequest, access: Access, options: MergeOptions
) -> str | None:
    retention: Retention | None = _filled_in(Retention, request.retention)
    if retention is None:
        return None
    words = [
        "thin-out",
        *words_of(retention),
        *words_of(options),
        *words_of(access),
        *_images(request),
    ]
    return shell_line(["chainmerge", *words])


def resume_command_of(request: RecordedRequest, address: Sequence[str] = ()) -> str:
    """What carries on a merge in the VM, as one types it into a shell.

    *address* leads to the disk now, where that is known better than from the request.
    """
    options = _filled_in(LiveOptions, request.options) or LiveOptions()
    access = access_of(request) or Access()
    said = (
        (name, value) for name, value in (*_said(options), *_said(access)) if name in _OF_RESUME
    )
    pace = [word for name, value in said for word in _say(name, value)]
    place = _lasting_address(address or request.address)
    return shell_line(["chainmerge", "live", "resume", *place, *pace])


def live_command_of(request: RecordedRequest) -> str | None:
    """What asks for the same merge of all its disks in the VM, as one types it into a shell.

    None if the record has what is not known here.
    """
    access, options = access_of(request), _filled_in(LiveOptions, request.options)
    if access is None or options is None:
        return None
    place = _lasting_address(request.address)
    words = ["live", "merge", *place, *words_of(options), *words_of(access), *_images(request)]
    return shell_line(["chainmerge", *words])


def shell_line(words: Iterable[str]) -> str:
    """Words as one types them into a shell, whatever is in them."""
    return " ".join(_quoted(word) for word in words)


def _quoted(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    # What is printed is made visible, and would be another word then.
    escaped = (
        chr(byte) if 0x20 <= byte < 0x7F and chr(byte) not in "\\'" else f"\\x{byte:02x}"
        for byte in os.fsencode(word)
    )
    return f"$'{''.join(escaped)}'"


def lasting_name(path: str | Path) -> str:
    """A path that leads to the same image from anywhere, also after the next boot.

    It is that of a link where a link was named.
    """
    name = os.path.abspath(path)  # noqa: PTH100 (of a link itself, whatever stands there)
    try:
        status = os.stat(name, follow_symlinks=False)  # noqa: PTH116
    except (OSError, ValueError):
        return name
    return _lasting_name_of(name, status.st_rdev) if stat.S_ISBLK(status.st_mode) else name


def _lasting_name_of(node: str, device: int) -> str:
    """The name of a block device that its volume manager or what it is gives it."""
    for directory in ("/dev/mapper", "/dev/disk/by-id"):
        try:
            found = sorted(Path(directory).iterdir())
        except OSError:
            continue
        for link in found:
            try:
                status = link.stat()
                if stat.S_ISBLK(status.st_mode) and status.st_rdev == device:
                    return str(link)
            except OSError:
                continue
    return node


def joint_address(addresses: Iterable[Sequence[str]]) -> list[str]:
    """The options that lead to several disks of a VM, in their order.

    Args:
        addresses: the options that lead to each; what leads to the VM is the same in all.
    """
    pairs = (pair for one in addresses for pair in zip(one[::2], one[1::2], strict=True))
    return [word for pair in dict.fromkeys(pairs) for word in pair]


def _lasting_address(address: Sequence[str]) -> Iterator[str]:
    """The same, with an absolute path to the monitor's socket."""
    before = ""
    for word in address:
        yield os.path.abspath(word) if before == "--qmp" else word  # noqa: PTH100
        before = word


def _said(options: Access | MergeOptions | LiveOptions | Retention) -> Iterator[tuple[str, Any]]:
    """The fields that are not at their default, as they are recorded."""
    for field in msgspec.structs.fields(options):
        usual = field.default
        if field.default_factory is not msgspec.NODEFAULT:
            usual = field.default_factory()
        value = getattr(options, field.name)
        if value != usual:
            yield field.name, _recordable(value, SPELLINGS[field.name].paths)


def _recordable(value: Any, paths: _Paths) -> Any:
    if isinstance(value, Mapping):
        behind = lasting_name if paths is _Paths.BOTH else str
        return {
            (key if key == ANY_IMAGE else lasting_name(key)): behind(one)
            for key, one in value.items()
        }
    if isinstance(value, tuple):
        return [_recordable(one, paths) for one in value]
    return lasting_name(value) if paths is _Paths.VALUE else value


def _filled_in(kind: Any, said: Mapping[str, Any]) -> Any:
    """The options in which *said* is said; None if it is not known here, or makes no sense."""
    if not said.keys() <= set(kind.__struct_fields__):
        return None
    try:
        return msgspec.convert(dict(said), type=kind)
    except (msgspec.ValidationError, Misuse):
        return None


def words_of(options: Access | MergeOptions | LiveOptions | Retention) -> list[str]:
    """What is typed for options that are not at their default; paths are absolute."""
    return [word for name, value in _said(options) for word in _say(name, value)]


def _say(name: str, value: Any) -> Iterator[str]:
    option = SPELLINGS[name].option
    match value:
        case bool():
            # An option that is on by default is said where it is off.
            yield option
        case Mapping():
            for key, one in value.items():
                yield from (option, one if key == ANY_IMAGE else f"{key}={one}")
        case list():
            for one in value:
                yield from (option, str(one))
        case _ if name == "keep_within":
            yield from (option, spelled_duration(value))
        case _:
            yield from (option, str(value))


def _images(request: RecordedRequest) -> Iterator[str]:
    for base in request.bases:
        yield from ("--base", base)
    yield "--"
    yield from request.tops
