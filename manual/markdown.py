# SPDX-License-Identifier: Apache-2.0
"""Text in the Markdown of the site's own pages, as MyST reads it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

_TYPED: Final = re.compile(r"(`[^`]+`)")
_OPTION: Final = re.compile(r"(?<![\w`-])--?[a-z][\w-]*")
_SPECIAL: Final = re.compile(r"([\\*_\[\]<>#|$~{}])")


def prose(text: str) -> str:
    """Return a paragraph: what is typed is in backticks, nothing else is taken for markup."""
    marked = "".join(map(_with_options_marked, _TYPED.split(text)))
    return "".join(
        part if part.startswith("`") else _SPECIAL.sub(r"\\\1", part)
        for part in _TYPED.split(marked)
    )


def _with_options_marked(part: str) -> str:
    return part if part.startswith("`") else _OPTION.sub(r"`\g<0>`", part)


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a table of cells that are in Markdown."""
    lines = (head, ("---",) * len(head), *rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def directive(name: str, argument: str, *lines: str) -> str:
    """Return a directive of Sphinx, with what is in it."""
    return "\n".join([f"```{{{name}}} {argument}".rstrip(), *lines, "```"])


def page(*parts: str) -> str:
    """Return parts as a page, with an empty line between."""
    return "\n\n".join(parts) + "\n"
