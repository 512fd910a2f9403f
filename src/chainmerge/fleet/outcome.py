# SPDX-License-Identifier: Apache-2.0
"""What became of a job, told from what its child has written and how it ended."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from chainmerge.documents.disks import DiskOutcome
from chainmerge.documents.fleet import SUCCESSES, FleetJobOutcome
from chainmerge.documents.merge import MergeOutcome
from chainmerge.documents.repair import RepairReport
from chainmerge.errors import ExitCode, Interrupted

if TYPE_CHECKING:
    from collections.abc import Iterable


class JobEnding(Struct, frozen=True):
    """What became of a job.

    Attributes:
        outcome: In a word.
        exit_code: Of the child; None if there was none.
        error_code: Of the error that it ended with.
        message: Why, if it is not done.
        report: The child's last line: its report, or its error.
    """

    outcome: FleetJobOutcome
    exit_code: int | None = None
    error_code: str | None = None
    message: str = ""
    report: str | None = None

    @property
    def is_success(self) -> bool:
        """Whether all that was asked for is so now."""
        return self.outcome in SUCCESSES


def outcome_named(name: str) -> FleetJobOutcome:
    """Return the outcome that the database has for a job: hosts write there what they like."""
    return FleetJobOutcome(name) if name in _NAMES else FleetJobOutcome.UNKNOWN


_NAMES = frozenset(outcome.value for outcome in FleetJobOutcome)
_BY_STATUS = {
    ExitCode.FAILED: FleetJobOutcome.FAILED,
    ExitCode.USAGE: FleetJobOutcome.FAILED,
    ExitCode.REFUSED: FleetJobOutcome.REFUSED,
    ExitCode.UNKNOWN: FleetJobOutcome.UNKNOWN,
}


def ending_of(lines: Iterable[str], status: int | None) -> JobEnding | None:
    """Return what became of a child, or None if it was interrupted and is to be run again.

    Args:
        lines: What it has written, one JSON document a line.
        status: Its exit status, negative if a signal ended it; None if nobody saw it end.
    """
    last = last_event(lines)
    match last.get("event"):
        case "report":
            return _ending_of_report(last)
        case None if "version" in last:
            # Commands without progress print nothing but what they have done.
            return _ending_of_report(last)
        case "error" if last.get("code") == Interrupted.code:
            return None
        case "error" if status is None or status not in _BY_STATUS:
            # Whoever saw it end is gone, and what it said does not tell its status.
            return None
        case "error":
            assert status is not None
            return JobEnding(
                _BY_STATUS[ExitCode(status)],
                status,
                str(last.get("code")),
                str(last.get("message")),
                json.dumps(last),
            )
        case _:
            return None


def _ending_of_report(report: dict[str, Any]) -> JobEnding | None:
    text = json.dumps(report)
    match report:
        case {"disks": [*parts]} | {"ranges": [*parts]}:
            return _ending_of_parts(parts, text)
        case {"findings": _, "actions": actions}:
            if msgspec.convert(report, RepairReport).leaves_damage:
                message = "damage is left that is not repaired here"
                return JobEnding(
                    FleetJobOutcome.FAILED, ExitCode.FAILED, message=message, report=text
                )
            return _success(text, is_new=bool(actions))
        case {"removed": removed}:
            return _success(text, is_new=bool(removed))
        case _:
            return _success(text, is_new=report.get("outcome") != MergeOutcome.ALREADY_MERGED)


def _success(report: str, *, is_new: bool) -> JobEnding:
    outcome = FleetJobOutcome.DONE if is_new else FleetJobOutcome.ALREADY
    return JobEnding(outcome, ExitCode.DONE, report=report)


def _ending_of_parts(parts: list[dict[str, Any]], report: str) -> JobEnding | None:
    """Return what became of several disks, or ranges of one: the worst that became of any."""
    outcomes = {part.get("outcome") for part in parts}
    for outcome, ending, status in (
        (DiskOutcome.UNKNOWN, FleetJobOutcome.UNKNOWN, ExitCode.UNKNOWN),
        (DiskOutcome.FAILED, FleetJobOutcome.FAILED, ExitCode.FAILED),
    ):
        if outcome in outcomes:
            errors = (part.get("error") for part in parts if part.get("outcome") == outcome)
            error = next(errors) or {}
            return JobEnding(ending, status, error.get("code"), error.get("message", ""), report)
    if outcomes & {DiskOutcome.INTERRUPTED, DiskOutcome.NOT_BEGUN}:
        return None
    return _success(report, is_new=bool(outcomes - {DiskOutcome.ALREADY_MERGED}))


def last_event(lines: Iterable[str]) -> dict[str, Any]:
    """Return the last whole document of lines that may end in the middle of one."""
    for line in reversed(list(lines)):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict):
            return event
    return {}
