# SPDX-License-Identifier: Apache-2.0
"""What is printed as advice: it destroys nothing, and it can be done.

That is: nothing in it destroys anything if it is followed as it stands, and a command of ours that
it names is one that the parser takes.
"""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import pytest

from chainmerge.catalogue import FINDINGS, known_errors
from chainmerge.cli import main

if TYPE_CHECKING:
    from collections.abc import Iterator

ERRORS = known_errors()
SOURCE: Final = Path(__file__).parents[2] / "src" / "chainmerge"
# What each would cost where the situation is not what it looks like.
DESTRUCTIVE = {
    r"rebase\b": "opens the image for writing, and a kill costs its checkpoints",
    r"qemu-img commit": "writes base, and loses checkpoints",
    r"--shrink \{": "cuts off what a guest has behind the new end",
    r"resize\b": "changes a guest's disk",
    r"--setrw": "lvm goes on having the volume read-only, and others may rely on it",
    r"\bkill -|kill \{": "a writer that is killed leaves half of what it wrote",
    r"--force\b": "makes false checkpoints",
    r"\brm\b|losetup -d": "removes what may be needed",
    r"repair \{image\} --yes|repair --yes \{image\}": "mends what nobody has looked at",
    r"snapshot -d": "deletes what people keep on purpose",
    # Internal snapshots are copied out like that, before anything is done about them.
    r"(?<!not )qemu-img convert(?! -O qcow2 -l)(?!.*keep)": "a copy has no bitmaps, no snapshots",
}
# These have other owners, or say in the same sentence what it costs.
KNOWN = {("internal-snapshots", r"snapshot -d")}


@pytest.mark.parametrize("code", ERRORS)
def test_no_hint_destroys(code: str) -> None:
    hint = ERRORS[code].hint
    found = {
        words: cost
        for words, cost in DESTRUCTIVE.items()
        if re.search(words, hint) and (code, words) not in KNOWN
    }
    assert not found, hint


# Commands that texts name

_QUOTED: Final = re.compile(r"[`']chainmerge( [^`'|]+)?[`'|]")
# What is not quoted goes on to the end of the clause.
_UNQUOTED: Final = re.compile(r"(?<![\w`'./-])chainmerge( [^`'|;,.:)]+)")
_A_FACT: Final = re.compile(r"\{[^}]*\}")
# Sentences about chainmerge in hints, which are no commands.
_PROSE: Final = {"(--engine auto", "(--data auto", "examine them (--activate activates them while"}
# Options that hints name of other programs, with the words before them.
_OF_OTHER_PROGRAMS: Final = re.compile(
    r"(?:qemu-[a-z-]+|lv[a-z]+|vg[a-z]+|virsh|qm|losetup|blockdev|lsof|fuser|mount|systemctl|ulimit"
    r"|cryptsetup|pip|dmsetup|apt)\b[^`;,]*"
)


def texts() -> Iterator[tuple[str, str]]:
    """Every text of the sources, docstrings included, and in which file it is."""
    for file in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(file.read_bytes())
        parts = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts |= {id(part) for part in node.values}
                text = "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "{}"
                    for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                if id(node) in parts:
                    continue
                text = node.value
            else:
                continue
            yield file.relative_to(SOURCE).as_posix(), " ".join(text.split())


def problem_of(line: str) -> str:
    """What the parser objects to in a command, which may leave out what is obvious; or nothing."""
    rest = shlex.split(_A_FACT.sub("1", line))
    command: click.Command = main.cli
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        within = command.get_command(click.Context(command), rest[0])
        if within is None:
            return f"no such command: {rest[0]}"
        command, rest = within, rest[1:]
    options = options_of(command)
    unknown = [word for word in rest if re.match("-+[a-z]", word) and word not in options]
    if unknown:
        return f"no such option: {unknown}"
    named = any(not word.startswith("-") for word in rest)
    # A command with nothing to work on is mentioned, not written out.
    if not named or isinstance(command, click.Group):
        return ""
    try:
        command.make_context(command.name, rest)
    except click.UsageError as error:
        return error.format_message()
    return ""


def options_of(command: click.Command) -> set[str]:
    context = click.Context(command, help_option_names=["-h", "--help"])
    return {
        name
        for parameter in command.get_params(context)
        if isinstance(parameter, click.Option)
        for name in parameter.opts
    }


def all_options(command: click.Command = main.cli) -> set[str]:
    """The options of a command and of all that are in it."""
    found = options_of(command)
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            within = command.get_command(context, name)
            assert within is not None
            found |= all_options(within)
    return found


def starts_a_command(words: str) -> bool:
    return words.split(maxsplit=1)[0] in main.cli.list_commands(click.Context(main.cli))


def test_every_command_that_a_text_names_is_one() -> None:
    named = [
        (where, match[1] or "")
        for where, text in texts()
        for match in _QUOTED.finditer(text)
        # What is said of every command.
        if match[1] != " COMMAND --help"
    ]
    assert len(named) > 60
    wrong = {(where, line): problem_of(line) for where, line in named if problem_of(line)}
    assert not wrong


def test_every_command_that_is_not_quoted_is_one() -> None:
    named = [
        (where, match[1])
        for where, text in texts()
        for match in _UNQUOTED.finditer(text)
        if starts_a_command(match[1])
    ]
    wrong = {(where, line): problem_of(line) for where, line in named if problem_of(line)}
    assert not wrong


@pytest.mark.parametrize("code", ERRORS)
def test_a_hint_that_names_chainmerge_names_a_command(code: str) -> None:
    prose = [
        match[1].strip()
        for match in _UNQUOTED.finditer(ERRORS[code].hint)
        if not starts_a_command(match[1])
    ]
    assert not [one for one in prose if not one.startswith(tuple(_PROSE))]


@pytest.mark.parametrize("code", [*ERRORS, *FINDINGS])
def test_options_in_an_error_are_options_of_ours(code: str) -> None:
    if code in FINDINGS:
        said = [FINDINGS[code].sentence, FINDINGS[code].explanation, FINDINGS[code].advice]
    else:
        said = [ERRORS[code].template, ERRORS[code].explanation, ERRORS[code].hint]
    ours = _OF_OTHER_PROGRAMS.sub("", " ".join(said))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", ours))
    assert named <= all_options()


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("frobnicate", "no such command"),
        ("bitmaps frobnicate IMAGE", "no such command"),
        ("merge --frobnicate", "no such option"),
        ("plan --yes {top}", "no such option"),
        ("relink {image} --backing", "requires an argument"),
        ("merge {top} --engine magic", "magic"),
        ("bitmaps add {image}", "Missing argument"),
    ],
)
def test_a_command_that_cannot_be_typed_is_seen(line: str, why: str) -> None:
    assert why in problem_of(line)


@pytest.mark.parametrize(
    "line", ["", "bitmaps", "merge", "--help", "relink {image} --backing NEW", "repair --yes {x}"]
)
def test_a_command_that_can_be_typed_is_right(line: str) -> None:
    assert problem_of(line) == ""
