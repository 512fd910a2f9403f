# SPDX-License-Identifier: Apache-2.0
"""The manual pages that ``make man`` made, as groff, mandoc and whatis read them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Final

import pytest

PAGES: Final = sorted((Path(__file__).parents[2] / "build" / "man").glob("*.[17]"))


def test_there_are_pages() -> None:
    assert len(PAGES) > 30, "make man"


def ran(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """A command that has ended, whatever it says of pages."""
    return subprocess.run(
        command,
        capture_output=True,
        check=False,
        text=True,
        env={**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "80", "MANPAGER": "cat"},
    )


def test_mandoc_has_nothing_to_complain_of() -> None:
    lint = ran("mandoc", "-T", "lint", *PAGES)
    assert (lint.returncode, lint.stdout, lint.stderr) == (0, "", "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_man_warns_of_nothing(page: Path) -> None:
    man = ran("man", "--warnings", "-l", page)
    assert (man.returncode, man.stderr) == (0, "")
    assert man.stdout.startswith(page.stem.upper())


def test_whatis_knows_what_pages_are_for() -> None:
    lines = ran("lexgrog", *PAGES).stdout.splitlines()
    assert len(lines) == len(PAGES)
    for page, line in zip(PAGES, lines, strict=True):
        assert line.startswith(f'{page}: "{page.stem} - ')
