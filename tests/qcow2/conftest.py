# SPDX-License-Identifier: Apache-2.0
"""Small images of each kind, built once."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from tests.qcow2.samples import BUILDERS, Sample, assert_clean, tables_of
from tests.support.images import (
    open_qcow2,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Sample]]:
    made = {}
    for name, build in BUILDERS.items():
        path = tmp_path_factory.mktemp(name) / "image.qcow2"
        build(path)
        assert_clean(path)
        cluster_size = open_qcow2(path).header.cluster_size
        made[name] = Sample(path, tables_of(path), cluster_size, path.stat().st_size)
    yield made
    for sample in made.values():
        shutil.rmtree(sample.path.parent)
