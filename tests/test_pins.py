# SPDX-License-Identifier: Apache-2.0
"""What packages carry is what pyproject.toml asks for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement

ROOT: Final = Path(__file__).parents[1]
PINS: Final = (ROOT / "release/requirements.txt").read_text(encoding="utf-8")
FROM_THE_SYSTEM: Final = "libvirt"


def _name(written: str) -> str:
    return re.sub(r"[-_.]+", "-", written).lower()


def _pinned() -> dict[str, str]:
    return {
        _name(name): version
        for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", PINS, re.MULTILINE)
    }


def _asked_for() -> list[Requirement]:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = declared["optional-dependencies"]
    needed = [one for extra, some in extras.items() if extra != FROM_THE_SYSTEM for one in some]
    return [Requirement(text) for text in (*declared["dependencies"], *needed)]


def test_all_that_is_asked_for_is_pinned() -> None:
    pinned = _pinned()
    missing = {
        str(asked)
        for asked in _asked_for()
        if not asked.specifier.contains(pinned.get(_name(asked.name), "0.dev0"))
    }
    assert missing == set(), "run make lock"


def test_each_is_known_by_digests() -> None:
    entries = re.split(r"\n(?=\S)", PINS.partition("\n\n")[2] or PINS)
    without = [entry for entry in entries if "==" in entry and "--hash=sha256:" not in entry]
    assert without == []
