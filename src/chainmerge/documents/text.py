# SPDX-License-Identifier: Apache-2.0
"""Text that is safe to print."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Return *text* with everything that is not plainly visible as a backslash escape.

    Bitmap and file names can come from a hostile guest: an escape sequence in them would control
    the user's terminal, a newline would forge a line of a report, a bidirectional override would
    change the order of the characters. Bytes that are not UTF-8 (surrogates, to Python) become
    ``\xNN``. The result can always be encoded.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else _escape(character) for character in text
    )


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if 0xD800 <= code <= 0xDFFF:
        return f"\\u{code:04x}"
    return character.encode("unicode_escape").decode("ascii")
