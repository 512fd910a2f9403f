# SPDX-License-Identifier: Apache-2.0
"""A fleet as metrics, in the text format of Prometheus: its jobs, hosts and keys, and its chains.

Names and units are as those of a scan of one host.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from chainmerge.documents.fleet import FleetJobOutcome, FleetJobState
from chainmerge.report.metrics import Metric, exposed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from chainmerge.documents.fleet import FleetHostStatus, FleetStatus
    from chainmerge.documents.fleet_inventory import FleetPictures, HostInventory

_OF_HOSTS: Final[Mapping[str, tuple[str, Callable[[FleetHostStatus], float]]]] = {
    "fleet_host_silent_seconds": (
        "How long ago the worker of the host last spoke.",
        lambda host: host.silent_seconds,
    ),
    "fleet_host_drained": ("Whether nothing starts on the host.", lambda host: host.drained),
}
_OF_SCANS: Final[Mapping[str, tuple[str, Callable[[HostInventory], float]]]] = {
    "fleet_scan_start_time_seconds": (
        "When the last scan of the host began, since the epoch.",
        lambda host: host.scanned_at,
    ),
    "fleet_images": ("Images of the host.", lambda host: host.images),
    "fleet_chains": ("Chains of the host.", lambda host: len(host.chains)),
    "fleet_longest_chain_images": ("Images of its longest chain.", lambda host: host.longest),
    "fleet_occupied_bytes": ("What its images take.", lambda host: host.occupied_bytes),
    "fleet_reclaimable_bytes": (
        "What merging all its chains would free; shared ones count for each host.",
        lambda host: host.freed_bytes,
    ),
    "fleet_stale_bitmap_bytes": (
        "What bitmaps take that no backup can use.",
        lambda host: host.stale_bytes,
    ),
    "fleet_unfinished_merges": (
        "Chains with a merge that was not finished.",
        lambda host: sum(chain.unfinished for chain in host.chains),
    ),
    "fleet_critical_findings": ("Critical findings of its last scan.", lambda host: host.critical),
}


def metrics_of_fleet(status: FleetStatus, found: FleetPictures) -> bytes:
    """The text of a file with all that is known of a fleet.

    Args:
        status: what runs and waits.
        found: what the last scans have found.

    Raises ImportError: prometheus-client is not there.
    """
    return exposed((*_of_jobs(status, found), *_of_inventory(found)), {})


def _of_jobs(status: FleetStatus, found: FleetPictures) -> Iterator[Metric]:
    counts = [
        ((host.host, state.value), count)
        for host in status.hosts
        for state, count in (
            (FleetJobState.RUNNING, host.running),
            (FleetJobState.WAITING, host.waiting),
        )
    ]
    yield Metric("fleet_jobs", "Jobs that have not ended.", ("host", "state"), tuple(counts))
    outcomes = {one.outcome: one.jobs for one in found.outcomes}
    yield Metric(
        "fleet_results",
        "Jobs that have ended and are not forgotten, by what became of them.",
        ("outcome",),
        tuple(((one.value,), outcomes.get(one.value, 0)) for one in FleetJobOutcome),
    )
    left = sum(job.bytes_left for job in status.jobs)
    yield Metric(
        "fleet_running_bytes_left", "What running merges have left to copy.", (), (((), left),)
    )
    for name, (text, value_of) in _OF_HOSTS.items():
        values = (((host.host,), value_of(host)) for host in status.hosts)
        yield Metric(name, text, ("host",), tuple(values))
    yield Metric(
        "fleet_key_held",
        "Jobs that hold a key.",
        ("key",),
        tuple(((key.key,), key.held) for key in status.keys),
    )
    yield Metric(
        "fleet_key_limit",
        "Jobs that may hold a key; 0 while it is paused.",
        ("key",),
        tuple(
            ((key.key,), 0 if key.paused else key.limit)
            for key in status.keys
            if key.limit is not None
        ),
    )


def _of_inventory(found: FleetPictures) -> Iterator[Metric]:
    for name, (text, value_of) in _OF_SCANS.items():
        values = (((host.host,), value_of(host)) for host in found.hosts)
        yield Metric(name, text, ("host",), tuple(values))
    refused = Counter(
        (host.host, code)
        for host in found.hosts
        for chain in host.chains
        for code in {refusal.code for refusal in chain.refusals}
    )
    yield Metric(
        "fleet_refused_chains",
        "Chains whose merge would be refused, by reason.",
        ("host", "code"),
        tuple((words, refused[words]) for words in sorted(refused)),
    )
    yield Metric(
        "fleet_shared_refused",
        "Volume groups that several hosts use without locks: nothing is merged there.",
        (),
        (((), sum(place.is_refused for place in found.shared)),),
    )
