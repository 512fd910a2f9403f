# SPDX-License-Identifier: Apache-2.0
"""A scan as metrics, in the text format of Prometheus: for node_exporter's textfile collector.

Names and units follow https://prometheus.io/docs/practices/naming/. Each metric says what was
scanned, so that several files on one host do not contradict each other.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from chainmerge.documents.scan import Severity
from chainmerge.documents.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

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


def metrics_of_scan(report: ScanReport) -> bytes:
    """The text of a file with all that is known of some places."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Scan(report))
    return generate_latest(registry)


class _Scan(Collector):
    """What a scan has found, for a registry."""

    def __init__(self, report: ScanReport) -> None:
        self._report = report
        self._places = ", ".join(report.places)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """All metrics."""
        for name, (text, value_of) in _OF_SCANS.items():
            yield self._metric(name, text, (), [((), value_of(self._report))])
        yield self._metric(
            "findings", "Findings of a severity.", ("severity",), self._by_severity()
        )
        yield self._metric(
            "images_with_finding",
            "Images with a finding of a kind.",
            ("code", "severity"),
            self._by_code(),
        )
        for name, (text, value_of_chain) in _OF_CHAINS.items():
            values = ((chain.leaf, value_of_chain(chain)) for chain in self._report.chains)
            known = [((leaf,), value) for leaf, value in values if value is not None]
            yield self._metric(name, text, ("leaf",), known)
        yield self._metric(
            "limit_reached_time_seconds",
            "When a chain or a storage reaches its limit if it goes on as before, since the epoch.",
            ("kind", "name"),
            (((one.kind, one.name), one.reached_at) for one in self._report.forecasts),
        )

    def _metric(
        self,
        name: str,
        text: str,
        labels: tuple[str, ...],
        values: Iterable[tuple[tuple[str, ...], float]],
    ) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"{_PREFIX}{name}", text, labels=["places", *labels])
        for words, value in values:
            family.add_metric([printable(word) for word in (self._places, *words)], float(value))
        return family

    def _by_severity(self) -> Iterator[tuple[tuple[str, ...], float]]:
        for severity in Severity:
            yield (severity.value,), self._report.count_of(severity)

    def _by_code(self) -> Iterator[tuple[tuple[str, ...], float]]:
        kinds = {(one.code, one.severity.value, one.image) for one in self._report.findings}
        counts = Counter((code, severity) for code, severity, _ in kinds)
        yield from ((kind, counts[kind]) for kind in sorted(counts))
