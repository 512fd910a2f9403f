# SPDX-License-Identifier: Apache-2.0
"""Images to start with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chainmerge.options import MergeOptions
from chainmerge.records.merge_journal import journal_file
from tests.merging.journal.killed import (
    AFTER_SWITCH,
    LEVELS,
    OPTIONS,
    Images,
    Outcome,
    build,
    copy,
    killed,
    outcome,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Images]:
    directory = tmp_path_factory.mktemp("templates")
    return {levels: build(directory / str(levels), levels) for levels in LEVELS}


@pytest.fixture(scope="session")
def outcomes(
    templates: dict[int, Images], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, str], Outcome]:
    """What merges come to that nobody interrupts."""
    directory = tmp_path_factory.mktemp("outcomes")
    found = {}
    for levels, template in templates.items():
        for name, options in OPTIONS.items():
            images = copy(template, directory / f"{levels}-{name}")
            images.merge(options)
            found[levels, name] = outcome(images, options)
            assert not journal_file(images.base).exists()
    return found


@pytest.fixture
def switched(templates: dict[int, Images], tmp_path: Path) -> Images:
    """A merge of one level that was killed when base was switched."""
    images = copy(templates[1], tmp_path / "it")
    killed(images, MergeOptions(), AFTER_SWITCH["switched"])
    return images
