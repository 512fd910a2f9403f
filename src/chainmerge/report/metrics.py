# SPDX-License-Identifier: Apache-2.0
"""A scan as metrics, in the text format of Prometheus: for node_exporter's textfile collector.

Names and units follow https://prometheus.io/docs/practices/naming/. Each metric says what was
scanned, so that several files on one host do not contradict each other.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from chainmerge.documents.scan import Severity
from chainmerge.documents.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from chainmerge.documents.chains import ChainSummary
    from chainmerge.documents.scan import ScanReport

METRICS_BEGINNING: Final = "# HELP chainmerge_"
"""How each of these files begins."""
_PREFIX: Final = "chainmerge_"
_OF_SCANS: Final[Mapping[str, tuple[str, Callable[[ScanReport], float]]]] = {
    "scan_start_time_seconds": (
        "When the last scan began, since the epoch.",
        lambda report: report.scanned_at,
    ),
    "images": ("Images that were found.", lambda report: len(report.images)),
    "chains": ("Chains that were found.", lambda report: len(report.chains)),
    "occupied_bytes": ("What the files of all images take.", lambda report: report.occupied_bytes),
    "reclaimable_bytes": ("What merging all chains would free.", lambda report: report.freed_bytes),
}
_OF_CHAINS: Final[Mapping[str, tuple[str, Callable[[ChainSummary], float | None]]]] = {
    "chain_images": ("Images of the chain.", lambda chain: chain.images),
    "chain_occupied_bytes": (
        "What the files of the chain take; shared ones count in each chain.",
        lambda chain: chain.occupied_bytes,
    ),
    "chain_reclaimable_bytes": (
        "What merging the chain would free.",
        lambda chain: chain.freed_bytes,
    ),
    "chain_unfinished_merge": (
        "Whether a merge of the chain was not finished.",
        lambda chain: chain.unfinished,
    ),
    "chain_has_problem": (
        "Whether the chain is damaged or cannot be read.",
        lambda chain: chain.problem is not None,
    ),
}


class Metric(Struct, frozen=True):
    """A gauge: its name, what it is, its labels, and its values by theirs."""

    name: str
    text: str
    labels: tuple[str, ...]
    values: tuple[tuple[tuple[str, ...], float], ...]


def metrics_of_scan(report: ScanReport) -> bytes:
    """The text of a file with all that is known of some places.

    Raises ImportError: prometheus-client is not there.
    """
    # Imported where they are used: the package is optional.
    from prometheus_client import CollectorRegistry, Gauge, generate_latest  # noqa: PLC0415

    registry = CollectorRegistry()
    places = printable(", ".join(report.scope))
    for metric in scan_metrics(report):
        name = f"{_PREFIX}{metric.name}"
        gauge = Gauge(name, metric.text, ["places", *metric.labels], registry=registry)
        for words, value in metric.values:
            gauge.labels(places, *map(printable, words)).set(value)
    return generate_latest(registry)


def scan_metrics(report: ScanReport) -> Iterator[Metric]:
    """All metrics of a scan."""
    for name, (text, value_of) in _OF_SCANS.items():
        yield Metric(name, text, (), (((), value_of(report)),))
    by_severity = (((severity.value,), report.count_of(severity)) for severity in Severity)
    yield Metric("findings", "Findings of a severity.", ("severity",), tuple(by_severity))
    yield Metric(
        "images_with_finding",
        "Images with a finding of a kind.",
        ("code", "severity"),
        tuple(_images_by_code(report)),
    )
    for name, (text, value_of_chain) in _OF_CHAINS.items():
        values = ((chain.leaf, value_of_chain(chain)) for chain in report.chains)
        known = (((leaf,), value) for leaf, value in values if value is not None)
        yield Metric(name, text, ("leaf",), tuple(known))
    yield Metric(
        "limit_reached_time_seconds",
        "When a chain or a storage reaches its limit if it goes on as before, since the epoch.",
        ("kind", "name"),
        tuple(((one.kind.value, one.name), one.reached_at) for one in report.forecasts),
    )


def _images_by_code(report: ScanReport) -> Iterator[tuple[tuple[str, ...], float]]:
    kinds = {(one.code, one.severity.value, one.image) for one in report.findings}
    counts = Counter((code, severity) for code, severity, _ in kinds)
    yield from ((kind, counts[kind]) for kind in sorted(counts))
