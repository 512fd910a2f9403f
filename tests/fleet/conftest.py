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


@pytest.fixture(scope="session")
def set_up_database(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database in which a fleet is set up: setting up each would take longer than most tests."""
    name = "set_up"
    Fleet(cluster, cluster.new_database(name), tmp_path_factory.mktemp(name)).set_up()
    return name


@pytest.fixture
def fleet(cluster: Cluster, set_up_database: str, tmp_path: Path) -> Iterator[Fleet]:
    database = cluster.new_database(f"fleet{next(_NUMBERS)}", set_up_database)
    found = Fleet(cluster, database, tmp_path)
    found.let_operator_in()
    try:
        yield found
    finally:
        found.close()
