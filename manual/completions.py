# SPDX-License-Identifier: Apache-2.0
"""What packages install so that shells complete words of the program."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from chainmerge.cli.main import cli
from chainmerge.cli.shells import SHELLS, script_for
from manual.commands import PROGRAM

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_FILES: Final[Mapping[str, str]] = MappingProxyType(
    {"bash": PROGRAM, "zsh": f"_{PROGRAM}", "fish": f"{PROGRAM}.fish"}
)
"""By shell, under which name it finds the script of a program that it is to complete."""


def write_completions(directory: Path) -> None:
    """Write ``SHELL/FILE`` for each shell, the file being called as the shell looks for it."""
    for shell in SHELLS:
        file = directory / shell / _FILES[shell]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{script_for(shell, cli)}\n", encoding="ascii")
