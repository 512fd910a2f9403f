# SPDX-License-Identifier: Apache-2.0
"""Text in the language of manual pages, man(7), which both groff and mandoc read."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection

_WIDTH: Final = 78
_SPECIAL: Final = {"\\": r"\e", "'": r"\(aq", "`": r"\(ga", "^": r"\(ha", "~": r"\(ti"}
# What is typed: in backticks, or an option; and words that stand for something.
_MARKED: Final = re.compile(
    r"`(?P<typed>[^`]+)`|(?P<option>(?<!\S)--?[a-z][\w-]*)|(?P<word>[A-Z]+)"
)


def escaped(text: str) -> str:
    """Return text as roff has to have it to print it."""
    plain = "".join(_SPECIAL.get(character, character) for character in text)
    return "".join(one if one.isascii() else rf"\[u{ord(one):04X}]" for one in plain)


def typed(text: str) -> str:
    """Return what somebody types, who copies it from the page: with ASCII's hyphens."""
    return escaped(text).replace("-", r"\-")


def bold(text: str) -> str:
    return rf"\fB{typed(text)}\fR"


def italic(text: str) -> str:
    # A list of choices may be longer than a line: it can be broken behind each.
    return rf"\fI{typed(text)}\fR".replace("|", r"|\:")


def prose(text: str, standing_for: Collection[str] = ()) -> str:
    """Return a paragraph, in lines: what is typed in bold, words that stand for others in italics.

    Args:
        text: In backticks is what is typed.
        standing_for: Words in capitals that the reader replaces.
    """
    parts, at = [], 0
    for found in _MARKED.finditer(text):
        if found["word"] and found["word"] not in standing_for:
            continue
        parts.append(escaped(text[at : found.start()]))
        is_typed = found["typed"] or found["option"]
        parts.append(bold(is_typed) if is_typed else italic(found["word"]))
        at = found.end()
    return folded("".join([*parts, escaped(text[at:])]))


def folded(text: str) -> str:
    """Return text in lines that are not too long, none of which is taken for a request."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > _WIDTH:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}" if lines[-1] else word
    return "\n".join(rf"\&{line}" if line.startswith((".", "'")) else line for line in lines)


def heading(text: str) -> str:
    """Return the heading of a section."""
    return f'.SH "{typed(text.upper())}"'


def subheading(text: str) -> str:
    return f'.SS "{typed(text)}"'


def tagged(tag: str, *paragraphs: str) -> str:
    """Return an entry of a list: a tag, already in roff, and paragraphs beside it."""
    first, *rest = paragraphs
    return "\n".join([".TP", tag, first, *(f".IP\n{paragraph}" for paragraph in rest)])


def example(*lines: str) -> str:
    """Return lines as they are typed or printed, indented."""
    return "\n".join([".PP", ".RS 4", ".EX", *map(typed, lines), ".EE", ".RE"])


def title(name: str, section: int, date: str, version: str) -> str:
    """Return the head of a page. *date* is like 2026-01-31."""
    fields = (typed(name.upper()), section, date, f"chainmerge {version}", "chainmerge manual")
    head = " ".join(f'"{field}"' for field in fields)
    # Neither hyphenated nor justified: words are long, and are copied.
    return f'.\\" SPDX-License-Identifier: Apache-2.0\n.TH {head}\n.nh\n.ad l'
