# SPDX-License-Identifier: Apache-2.0
"""A scan for people: the chains, and below them what is wrong, in eighty columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from chainmerge.arithmetic.counting import counted
from chainmerge.documents.scan import Severity
from chainmerge.report import layout
from chainmerge.report.chains_table import chains_listing
from chainmerge.report.forecasts import forecast_sentence
from chainmerge.report.layout import Block, stack, words
from chainmerge.report.names import ImageNames
from chainmerge.report.text import short_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.documents.scan import ScanFinding, ScanReport

_STYLES: Final = {
    Severity.INFO: layout.QUIET,
    Severity.WARNING: layout.CAUTION,
    Severity.CRITICAL: layout.BAD,
}


def scan_report(report: ScanReport) -> Block:
    """A line for each chain, then the findings with the command that mends each."""
    names = _names_of(report)
    places = ", ".join(report.places)
    if not report.images:
        return stack(words(f"no qcow2 images in {places}", layout.QUIET), *_left_out(report))
    return stack(
        words(_headline(report, places), layout.TITLE),
        words(_count_of_findings(report), _worst_style(report)),
        layout.EMPTY_LINE,
        chains_listing(report.chains, names),
        *_findings(report, names),
        *_forecasts(report, names),
        *_left_out(report),
    )


def _names_of(report: ScanReport) -> ImageNames:
    """Names without the place that all of them lie in."""
    if len(report.places) == 1 and report.places[0].startswith("/"):
        return ImageNames(f"{report.places[0].rstrip('/')}/")
    return ImageNames("")


def _headline(report: ScanReport, places: str) -> str:
    images, chains = counted(len(report.images), "image"), counted(len(report.chains), "chain")
    return (
        f"{images} in {chains} in {places}: {short_size(report.occupied_bytes)} on disk; merging "
        f"frees about {short_size(report.freed_bytes)}"
    )


def _count_of_findings(report: ScanReport) -> str:
    if not report.findings:
        return "nothing found that is wrong"
    counts = {
        Severity.CRITICAL: f"{report.count_of(Severity.CRITICAL)} critical",
        Severity.WARNING: counted(report.count_of(Severity.WARNING), "warning"),
        Severity.INFO: f"{report.count_of(Severity.INFO)} for information",
    }
    return f"{counted(len(report.findings), 'finding')}: " + ", ".join(
        text for severity, text in counts.items() if report.count_of(severity)
    )


def _worst_style(report: ScanReport) -> str:
    return _STYLES[report.findings[0].severity] if report.findings else layout.GOOD


def _findings(report: ScanReport, names: ImageNames) -> Iterator[Block]:
    for severity in reversed(Severity):
        found = [one for one in report.findings if one.severity is severity]
        if found:
            yield layout.section(
                f"{severity.capitalize()}",
                *(part for finding in found for part in _lines(finding, names)),
            )


def _lines(finding: ScanFinding, names: ImageNames) -> Iterator[Block]:
    code = words(finding.code, _STYLES[finding.severity])
    sentence = words(f": {names.left_out_of(finding.sentence)}{_figures(finding)}")
    yield layout.joined(code, sentence)
    if finding.command is not None:
        yield layout.indented(layout.command(finding.command))


def _forecasts(report: ScanReport, names: ImageNames) -> Iterator[Block]:
    if report.forecasts:
        sentences = (names.left_out_of(forecast_sentence(one)) for one in report.forecasts)
        yield layout.section("If it goes on like this", layout.bullets(sentences))


def _figures(finding: ScanFinding) -> str:
    """The sizes that show it; other figures are in the sentence."""
    sizes = (
        f"{name.removesuffix('_bytes').removeprefix('bytes_').replace('_', ' ')} {short_size(size)}"
        for name, size in finding.evidence.items()
        if "bytes" in name
    )
    text = ", ".join(sizes)
    return f" ({text})" if text else ""


def _left_out(report: ScanReport) -> tuple[Block, ...]:
    if not report.left_out:
        return ()
    return (layout.section("Not looked at", layout.bullets(report.left_out, layout.CAUTION)),)
