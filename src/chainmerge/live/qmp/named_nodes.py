# SPDX-License-Identifier: Apache-2.0
"""What a VM says of all its nodes, asked for only while that does not end it.

A ``block-stream`` job that has ended and was not dismissed keeps a filter with nothing below.
QEMU (7.2) ends by a segmentation fault when it is asked for its nodes then, whoever asks.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from chainmerge.live.errors import LiveJobRunning

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from chainmerge.live.qmp.monitor import Monitor

ENDED: Final = frozenset({"concluded", "null"})
"""The states of a job that has ended and was not dismissed."""
# Whoever began such a job dismisses it within moments, unless he is gone.
_LOOKS: Final = 8
_SECONDS_BETWEEN_LOOKS: Final = 0.25


def is_ended_stream(job: Mapping[str, Any]) -> bool:
    """Whether a job, as ``query-jobs`` has it, keeps everybody from asking for nodes."""
    return job["type"] == "stream" and job["status"] in ENDED


def query_nodes(monitor: Monitor) -> list[dict[str, Any]]:
    """``query-named-block-nodes``, once no job stands against it.

    Raises LiveJobRunning, VmRefused, VmUnreachable.
    """
    for looks_left in reversed(range(_LOOKS)):
        ended = list(filter(is_ended_stream, monitor.execute("query-jobs")))
        if not ended:
            break
        if not looks_left:
            raise LiveJobRunning(monitor.name, ", ".join(map(_described, ended)))
        # It may be the only monitor by which the job can be dismissed.
        monitor.let_others_in()
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return _all_nodes(monitor)


def nodes_told(monitor: Monitor, jobs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All nodes; none where one of *jobs*, which are all there are, stands against it."""
    if any(map(is_ended_stream, jobs)):
        return []
    return _all_nodes(monitor)


def _all_nodes(monitor: Monitor) -> list[dict[str, Any]]:
    return list(monitor.execute("query-named-block-nodes", {"flat": True}))


def _described(job: Mapping[str, Any]) -> str:
    return (
        f"{job['id']} (stream, ended and not dismissed, so that QEMU would end if it was asked "
        "for its nodes)"
    )
