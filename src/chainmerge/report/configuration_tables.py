# SPDX-License-Identifier: Apache-2.0
"""Configuration files for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.arithmetic.counting import counted
from chainmerge.report import layout
from chainmerge.report.layout import Block, Words, stack, words

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from chainmerge.documents.configuration import (
        ConfigurationCheck,
        ConfigurationFile,
        ConfigurationReport,
        ConfiguredValue,
        SettingValue,
    )

_BUILT_IN = "built in"


def configuration_report(report: ConfigurationReport) -> Block:
    """Where files may lie, and each value with the file that it comes from."""
    return stack(_files(report.files), layout.EMPTY_LINE, _values(report))


def configuration_check(report: ConfigurationCheck) -> Block:
    """What was checked, and all that is wrong."""
    if not any(file.found for file in report.files):
        title = words("no configuration files: everything is as it is built in", layout.GOOD)
    elif report.problems:
        title = words(f"{counted(len(report.problems), 'problem')} found", layout.BAD)
    else:
        title = words("commands can go by these files", layout.GOOD)
    return stack(_files(report.files), layout.EMPTY_LINE, title, *_problems(report))


def _files(files: Iterable[ConfigurationFile]) -> Block:
    return layout.pairs(
        (
            words(file.scope, layout.QUIET),
            words(file.path) if file.found else words(f"{file.path} (not there)", layout.QUIET),
        )
        for file in files
    )


def _values(report: ConfigurationReport) -> Block:
    if not report.values:
        return words("nothing is set: everything is as it is built in", layout.QUIET)
    return layout.listing(("option", "value", "from"), map(_row, report.values))


def _row(value: ConfiguredValue) -> tuple[Words, Words, Words]:
    style = layout.QUIET if value.overridden or value.file is None else ""
    source = _BUILT_IN if value.file is None else f"{value.file} [{value.section}]"
    if value.overridden:
        source += ", overridden"
    return words(value.option, style), words(_said(value.value), style), words(source, style)


def _said(value: SettingValue) -> str:
    match value:
        case None | []:
            return "-"
        case bool():
            return "yes" if value else "no"
        case list():
            return ", ".join(map(str, value))
        case _:
            return str(value)


def _problems(report: ConfigurationCheck) -> Iterator[Block]:
    for one in report.problems:
        yield words(f"{one.file}: {one.problem}")
        yield words(f"  what to do: {one.suggestion}")
