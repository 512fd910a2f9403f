# SPDX-License-Identifier: Apache-2.0
"""Merges that are built once."""

from __future__ import annotations

import pytest

from tests.engines.native.recorded import Builder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp)
