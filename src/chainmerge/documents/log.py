# SPDX-License-Identifier: Apache-2.0
"""A line of the log that a command writes on request."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Mapping

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]

PRIORITIES: Final[Mapping[LogLevel, int]] = MappingProxyType(
    {"debug": 7, "info": 6, "warning": 4, "error": 3}
)
"""By level, its number in syslog and in systemd's journal: what is lower is more important."""


class LogLine(Struct, frozen=True, omit_defaults=True):
    """What has happened.

    Attributes:
        time: When it was, in seconds since 1970 (UTC).
        level: ``debug`` (how far a step has come), ``info`` (a step begins, all has ended),
            ``warning`` or ``error``.
        kind: ``step``, ``progress``, ``end``, ``warning`` or ``error``.
        message: It, in words.
        stage: Of a step and its progress, which one; as in ``progress-1``.
        top: Of a step and its progress, the overlay, where several disks are merged.
        done: Bytes dealt with, or files, images and chains in a scan; as in ``progress-1``.
        total: As ``done``, what there is to deal with.
        seconds: Of the end, how long it took.
        code: Of an error, its code.
        hint: Of an error, what to do about it.
    """

    time: float
    level: LogLevel
    kind: Literal["step", "progress", "end", "warning", "error"]
    message: str
    stage: str = ""
    top: str = ""
    done: int = 0
    total: int = 0
    seconds: float = 0.0
    code: str = ""
    hint: str = ""
