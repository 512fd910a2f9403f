# SPDX-License-Identifier: Apache-2.0
"""A server for all tests of the fleet, and a database of its own for each."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from tests.support.fleet import Fleet
from tests.support.postgresql import running_cluster

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.postgresql import Cluster

_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as found:
        yield found


@pytest.fixture
def fleet(cluster: Cluster, tmp_path: Path) -> Iterator[Fleet]:
    found = Fleet(cluster, cluster.new_database(f"fleet{next(_NUMBERS)}"), tmp_path)
    found.set_up()
    try:
        yield found
    finally:
        found.close()
