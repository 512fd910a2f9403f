# SPDX-License-Identifier: Apache-2.0
"""Whether what a caller gives can be meant: paths, sizes, durations, choices.

Checked where options are made and where a public function begins, so that nothing odd is first
met in the middle of a merge.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from chainmerge.errors import Misuse

LARGEST: Final = 2**63 - 1
"""Bytes: no file and no device is larger (the kernel's ``loff_t``)."""
_SHOWN: Final = 60


@dataclass(eq=False)
class OptionUnusable(Misuse):
    """An option or an argument has a value that it cannot have."""

    code: ClassVar[str] = "option-unusable"
    template: ClassVar[str] = "{option} cannot be {value}: it must be {allowed}"
    hint: ClassVar[str] = "give {option} another value, or leave it out if it is an option"
    explanation: ClassVar[str] = (
        "A value was given that makes no sense: a copy of 0 bytes per second, a path that no file "
        "can have, a choice that does not exist. Nothing was looked at and nothing was changed."
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
