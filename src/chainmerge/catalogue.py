# SPDX-License-Identifier: Apache-2.0
"""All errors of the package, to be looked up by their code."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import string
from operator import attrgetter
from pathlib import Path
from typing import ClassVar, Final

from chainmerge.errors import ChainmergeError, ExitCode, Misuse, all_errors


class UnknownCode(Misuse):
    """Asked to explain something that is not an error of ours."""

    code: ClassVar[str] = "unknown-code"
    template: ClassVar[str] = "there is no error with the code {asked!r}"
    hint: ClassVar[str] = "{suggestion}"
    explanation: ClassVar[str] = (
        "`chainmerge explain` knows the codes that chainmerge prints with its errors and puts in "
        "its JSON reports. Without a code it lists them all."
    )
    asked: str
    suggestion: str


def known_errors() -> dict[str, type[ChainmergeError]]:
    """Return all error classes by their codes, in the order of the codes.

    Imports the whole package, for only what is imported can be known.
    """
    for module in pkgutil.walk_packages([str(Path(__file__).parent)], "chainmerge."):
        if not module.name.endswith(".__main__"):
            importlib.import_module(module.name)
    # Who uses the package may have errors of their own that build on ours.
    ours = (error for error in all_errors() if error.__module__.startswith("chainmerge."))
    return {error.code: error for error in sorted(ours, key=attrgetter("code"))}


def explain(code: str) -> str:
    """Return the long form of an error: what it means and what to do, in paragraphs.

    Raises:
        UnknownCode: No error has this code.
    """
    errors = known_errors()
    if code not in errors:
        alike = difflib.get_close_matches(code, errors, n=3)
        suggestion = (
            f"did you mean {' or '.join(alike)}?" if alike else "`chainmerge explain` lists them"
        )
        raise UnknownCode(code, suggestion)
    error = errors[code]
    paragraphs = [
        f"{error.code} (exit status {error.exit_code:d}, {_MEANING[error.exit_code]})",
        with_placeholders(error.template),
        error.explanation,
        f"What to do: {with_placeholders(error.hint)}",
    ]
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def with_placeholders(template: str) -> str:
    """Return a template as a person reads it: with ``<name>`` where a fact goes."""
    parts = string.Formatter().parse(template)
    return "".join(text if field is None else f"{text}<{field}>" for text, field, _, _ in parts)


_MEANING: Final = {
    ExitCode.FAILED: "something was attempted and did not work",
    ExitCode.USAGE: "the request makes no sense",
    ExitCode.REFUSED: "refused, nothing was changed",
    ExitCode.UNKNOWN: "the outcome is unknown",
    ExitCode.INTERRUPTED: "stopped on request",
}
