# SPDX-License-Identifier: Apache-2.0
"""What tests of the command line share."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the program ``chainmerge``, as an installation has it."""
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "chainmerge"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m chainmerge "$@"\n')
    script.chmod(0o755)
    return folder
