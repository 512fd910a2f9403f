# SPDX-License-Identifier: Apache-2.0
"""What tests of space share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.runs import Runs, joined_runs
from chainmerge.storage.files import FileReadable

if TYPE_CHECKING:
    from pathlib import Path

    from chainmerge.qcow2.header import Header


MIB = 1 << 20


def header_of(path: Path) -> Header:
    with FileReadable(path) as readable:
        return Qcow2Image(readable).header


def runs_from(clusters: set[int]) -> Runs:
    ascending = np.array(sorted(clusters), np.int64)
    return joined_runs([Runs(ascending, np.ones(len(ascending), np.int64))])


def clusters_in(runs: Runs) -> set[int]:
    return {
        cluster
        for first, end in zip(runs.start, runs.end, strict=True)
        for cluster in range(first, end)
    }
