# SPDX-License-Identifier: Apache-2.0
"""Text in the Markdown of the site's own pages, as MyST reads it."""

from __future__ import annotations

import re
from typing import Final

_TYPED: Final = re.compile(r"(`[^`]+`)")
_OPTION: Final = re.compile(r"(?<![\w`-])--?[a-z][\w-]*")
_SPECIAL: Final = re.compile(r"([\\*_\[\]<>#|$~{}])")


def prose(text: str) -> str:
    """Return a paragraph: what is in backticks stays, nothing else is taken for markup."""
    parts = _TYPED.split(text)
    return "".join(part if part.startswith("`") else _SPECIAL.sub(r"\\\1", part) for part in parts)


def directive(name: str, argument: str, *lines: str) -> str:
    """Return a directive of Sphinx, with what is in it."""
    return "\n".join([f"```{{{name}}} {argument}".rstrip(), *lines, "```"])


def page(*parts: str) -> str:
    """Return parts as a page, with an empty line between."""
    return "\n\n".join(parts) + "\n"
