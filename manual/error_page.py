# SPDX-License-Identifier: Apache-2.0
"""The site's page of all errors and findings, each with an anchor of its code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.catalogue import MEANINGS, known_subjects
from manual.markdown import page, prose

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.catalogue import Subject
    from chainmerge.errors import ExitCode


def error_page() -> str:
    """Return the page."""
    return page(
        "# Errors and findings",
        "By exit status; `chainmerge explain CODE` shows the same.",
        *_parts(),
    )


def _parts() -> Iterator[str]:
    subjects = tuple(known_subjects().values())
    titles: dict[ExitCode | None, str] = {
        code: f"Exit status {code:d}: {meaning}" for code, meaning in MEANINGS.items()
    }
    for exit_code, title in {**titles, None: "Findings"}.items():
        yield f"## {title}"
        for subject in subjects:
            if subject.exit_code == exit_code:
                yield from _subject(subject)


def _subject(subject: Subject) -> Iterator[str]:
    yield f"### {subject.code}"
    for text in (subject.sentence, subject.explanation, f"What to do: {subject.advice}"):
        yield prose(" ".join(text.split()))
