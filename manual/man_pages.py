# SPDX-License-Identifier: Apache-2.0
"""Manual pages: one of each command in section 1, and one of all errors in section 7."""

from __future__ import annotations

import datetime as dt
import os
import re
import subprocess
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Final

from chainmerge.__about__ import __version__
from chainmerge.catalogue import MEANINGS, known_subjects
from manual import roff
from manual.commands import PROGRAM, all_commands, exit_statuses
from manual.examples import examples_of
from manual.surroundings import ENVIRONMENT, FILES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from chainmerge.catalogue import Subject
    from manual.commands import CommandManual, Option

ERRORS: Final = f"{PROGRAM}-errors"
"""The page of errors."""
_FOUND: Final = "Findings of check, repair, bitmaps list and scan"
_OF_OTHERS: Final = (("qemu-img", 1),)
_CAPITALS: Final = re.compile(r"\b[A-Z]+\b")


def write_man_pages(directory: Path) -> None:
    """Write all manual pages into a directory, which has no others then."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob(f"{PROGRAM}*.[17]"):
        old.unlink()
    for name, text in man_pages(date_of_sources()).items():
        (directory / name).write_text(text, encoding="ascii")


def man_pages(date: str) -> dict[str, str]:
    """Return all manual pages by the names of their files; *date* is like 2026-01-31."""
    commands = all_commands()
    pages = {f"{one.page}.1": _page_of(one, commands, date) for one in commands}
    return {**pages, f"{ERRORS}.7": _page_of_errors(date)}


def date_of_sources() -> str:
    """Return the day of the last change: pages made twice of the same sources are the same.

    It is that of ``SOURCE_DATE_EPOCH``, in seconds, or of the last commit.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH") or _time_of_last_commit()
    moment = dt.datetime.fromtimestamp(int(epoch), tz=dt.UTC)
    return moment.date().isoformat()


def _time_of_last_commit() -> str:
    asked = ["git", "log", "-1", "--format=%ct"]
    return subprocess.run(
        asked, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def _page_of(command: CommandManual, commands: Sequence[CommandManual], date: str) -> str:
    operands = _words_in_capitals(command.operands)
    values = _words_in_capitals(one.value for panel in command.panels for one in panel.options)
    standing_for = {*operands, *values} - {"OPTIONS"}
    summaries = {one.words: one.summary for one in commands}
    return _joined(
        roff.title(command.page, 1, date, __version__),
        roff.heading("Name"),
        _name(command.page, command.summary[0].lower() + command.summary[1:]),
        roff.heading("Synopsis"),
        roff.folded(" ".join([roff.bold(command.called), *map(_operand, command.operands)])),
        roff.heading("Description"),
        *_spaced(roff.prose(paragraph, standing_for) for paragraph in command.paragraphs),
        *_commands_within(command, summaries),
        roff.heading("Options"),
        *_options(command, standing_for),
        *_exit_status(),
        *(_surroundings() if command.words == (PROGRAM,) else ()),
        *_examples(command),
        *_see_also(command, commands),
    )


def _name(page: str, summary: str) -> str:
    return roff.folded(rf"{roff.typed(page)} \- {roff.escaped(summary)}")


def _words_in_capitals(texts: Collection[str] | Iterator[str]) -> set[str]:
    return {word for text in texts for word in _CAPITALS.findall(text)}


def _operand(operand: str) -> str:
    """An operand of the synopsis: brackets and dots are not replaced by anything."""
    return re.sub(r"[A-Z]+", lambda found: rf"\fI{found[0]}\fR", roff.typed(operand))


def _spaced(paragraphs: Iterator[str]) -> Iterator[str]:
    for number, paragraph in enumerate(paragraphs):
        yield paragraph if number == 0 else f".PP\n{paragraph}"


def _commands_within(
    command: CommandManual, summaries: dict[tuple[str, ...], str]
) -> Iterator[str]:
    if command.within:
        yield roff.heading("Commands")
        for words in command.within:
            yield roff.tagged(_reference("-".join(words), 1), roff.prose(f"{summaries[words]}."))


def _options(command: CommandManual, standing_for: Collection[str]) -> Iterator[str]:
    for panel in command.panels:
        if len(command.panels) > 1:
            yield roff.subheading(panel.title)
        yield from (_option(one, standing_for) for one in panel.options)


def _option(option: Option, standing_for: Collection[str]) -> str:
    names = ", ".join(map(roff.bold, option.spellings))
    value = f" {roff.italic(option.value)}" if option.value else ""
    return roff.tagged(f"{names}{value}", roff.prose(option.text, standing_for))


def _exit_status() -> Iterator[str]:
    yield roff.heading("Exit status")
    for number, meaning in exit_statuses().items():
        yield roff.tagged(roff.bold(str(number)), roff.prose(meaning))


def _surroundings() -> Iterator[str]:
    yield roff.heading("Environment")
    for variable, text in ENVIRONMENT.items():
        yield roff.tagged(roff.bold(variable), roff.prose(text))
    yield roff.heading("Files")
    for names, text in FILES.items():
        yield roff.tagged(
            roff.folded(", ".join(map(roff.italic, names))).replace("\n", " "), roff.prose(text)
        )


def _examples(command: CommandManual) -> Iterator[str]:
    found = examples_of(command.words) if not command.within else ()
    if found:
        yield roff.heading("Examples")
    yield from _spaced(f"{roff.prose(one.purpose)}:\n{roff.example(one.line)}" for one in found)


def _see_also(command: CommandManual, commands: Sequence[CommandManual]) -> Iterator[str]:
    """Its group, what its help speaks of, those beside it; not what its own list has."""
    said = " ".join(command.paragraphs)
    pages = {
        **{command.words[:depth]: None for depth in range(1, len(command.words))},
        **{
            one.words: None
            for one in commands
            if f"`{' '.join(one.words[1:])}`" in said or f"`{one.called}`" in said
        },
        **{
            one.words: None
            for one in commands
            if len(command.words) > 2 and one.words[:-1] == command.words[:-1]
        },
    }
    pages.pop(command.words, None)
    others = [("-".join(words), 1) for words in pages]
    yield roff.heading("See also")
    yield ",\n".join(_reference(*page) for page in (*others, (ERRORS, 7), *_OF_OTHERS))


def _reference(page: str, section: int) -> str:
    return rf"\fB{roff.typed(page)}\fR({section})"


def _page_of_errors(date: str) -> str:
    subjects = tuple(known_subjects().values())
    groups = [(f"Exit status {number:d}: {said}", number) for number, said in MEANINGS.items()]
    return _joined(
        roff.title(ERRORS, 7, date, __version__),
        roff.heading("Name"),
        _name(ERRORS, "what errors and findings of chainmerge mean, and what to do"),
        roff.heading("Description"),
        roff.prose(
            "Every error has a code. It is what a command names in the last line that it says of "
            "an error, and the field `code` of JSON documents. What `chainmerge check`, "
            "`chainmerge repair`, `chainmerge bitmaps list` and `chainmerge scan` find has one, "
            "too. Codes do not change. `chainmerge explain` shows the same text, and finds codes "
            "by words."
        ),
        *chain.from_iterable(
            (
                roff.heading(title),
                *(_subject(one) for one in subjects if one.exit_code == exit_code),
            )
            for title, exit_code in (*groups, (_FOUND, None))
        ),
        roff.heading("See also"),
        ",\n".join(_reference(page, 1) for page in (PROGRAM, f"{PROGRAM}-explain")),
    )


def _subject(subject: Subject) -> str:
    paragraphs = (subject.sentence, subject.explanation, f"What to do: {subject.advice}")
    return roff.tagged(
        roff.bold(subject.code),
        *(roff.prose(" ".join(paragraph.split())) for paragraph in paragraphs),
    )


def _joined(*parts: str) -> str:
    return "\n".join(parts) + "\n"
