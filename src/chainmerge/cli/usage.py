# SPDX-License-Identifier: Apache-2.0
"""Wrong usage: what somebody may have meant who knows other programs, or has mistyped."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import click

from chainmerge.cli.commands import NoSuchWord
from chainmerge.cli.errors import WrongUsage
from chainmerge.cli.words import close_to, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

_PULL: Final = (
    "`chainmerge merge --direction pull TOP` does that, `chainmerge flatten TOP` down to the end "
    "of the chain, and `chainmerge live merge --direction pull TOP` while the VM runs"
)
_LIST_CHAINS: Final = (
    "`chainmerge list DIR` lists the chains of a directory, and what each would free"
)
_SCAN: Final = "`chainmerge scan PATH` finds all images, and what is wrong with them"
_INFO: Final = (
    "`chainmerge info IMAGE` lists the images of a chain, `chainmerge bitmaps list IMAGE` its "
    "bitmaps"
)
_MERGE: Final = "`chainmerge merge TOP` does that"
_MERGE_OR_LIVE: Final = f"{_MERGE}, and `chainmerge live merge TOP` while the VM runs"
_FLATTEN: Final = "`chainmerge flatten TOP` makes an image independent, and keeps its bitmaps"
_RELINK: Final = "`chainmerge relink IMAGE --backing NEW` gives an image another backing file"
_ADD: Final = "`chainmerge bitmaps add IMAGE NAME` does that"
_REMOVE: Final = "`chainmerge bitmaps remove IMAGE NAME` does that"
_LIST: Final = "`chainmerge bitmaps list IMAGE` does that"
_LIVE: Final = "`chainmerge live merge TOP` does that"
_FINISH: Final = (
    "`chainmerge status` prints the command that finishes a merge; in a running VM "
    "`chainmerge live resume` does that"
)

WORDS_OF_OTHERS: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        "chainmerge": {
            "add": _ADD,
            "audit": _SCAN,
            "block-commit": _LIVE,
            "block-stream": "`chainmerge live merge --direction pull TOP` does that",
            "blockcommit": _MERGE_OR_LIVE,
            "blockpull": _PULL,
            "clear": "`chainmerge bitmaps clear IMAGE NAME` does that",
            "commit": _MERGE_OR_LIVE,
            "consolidate": _MERGE,
            "continue": _FINISH,
            "convert": _FLATTEN,
            "delete": "`chainmerge merge --delete TOP` merges a snapshot and deletes its file",
            "dry-run": "`chainmerge plan TOP` shows what a merge would do",
            "finish": _FINISH,
            "fix": "`chainmerge repair IMAGE` shows what is wrong and what it would do about it",
            "health": _SCAN,
            "help": "see `chainmerge --help`, or `chainmerge explain` for the errors",
            "inventory": _SCAN,
            "ls": _LIST_CHAINS,
            "map": _INFO,
            "prune": "`chainmerge bitmaps prune TOP` does that",
            "pull": _PULL,
            "rebase": _RELINK,
            "remove": "`chainmerge bitmaps remove IMAGE NAME` removes a bitmap, `chainmerge merge "
            "--delete TOP` a snapshot",
            "resume": _FINISH,
            "rm": "`chainmerge merge --delete TOP` merges a snapshot and deletes its file",
            "show": _INFO,
            "stream": _PULL,
            "tree": _INFO,
            "undo": "`chainmerge repair --undo BACKUP` takes back a repair",
        },
        "chainmerge bitmaps": {
            "create": _ADD,
            "delete": _REMOVE,
            "disable": "`chainmerge bitmaps add --disabled IMAGE NAME` adds one that records no "
            "writes",
            "info": _LIST,
            "ls": _LIST,
            "new": _ADD,
            "fix": "`chainmerge bitmaps repair LEAF` drops unusable bitmaps from a whole chain",
            "reset": "`chainmerge bitmaps clear IMAGE NAME` does that",
            "rm": _REMOVE,
            "show": _LIST,
        },
        "chainmerge live": {
            "block-commit": _LIVE,
            "blockcommit": _LIVE,
            "commit": _LIVE,
            "continue": "`chainmerge live resume` does that",
            "finish": "`chainmerge live resume` does that",
            "info": "`chainmerge live status` shows what is unfinished, `chainmerge info IMAGE` a "
            "chain",
        },
    }
)
"""By group: a word of other programs, and what does here what it does there."""

OPTIONS_OF_OTHERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "--backing-chain": "`chainmerge info IMAGE` always shows the whole chain",
        "--dry-run": "`chainmerge plan TOP` shows what a merge would do",
        "--force": "what is refused says itself how to go on, and by which option",
        "--image": "images are given without an option: `chainmerge merge TOP`",
        "--pivot": "nothing has to be asked for: `chainmerge live merge TOP` switches the VM to "
        "base where TOP is its active layer",
        "--progress": "progress is always shown; `chainmerge merge --quiet TOP` shows none",
        "--top": "TOP is given without an option: `chainmerge merge TOP --base BASE`",
        "--wait": "all commands wait until their work is done",
        "--yes": "this command does not ask: leave the option out",
        "-b": "write `--base BASE` for the image to merge into, `--backing NEW` for `chainmerge "
        "relink IMAGE`",
        "-f": "formats are given with their images: `--format IMAGE=raw`",
        "-F": "formats are given with their images: `--format IMAGE=raw`",
        "-n": "`chainmerge plan TOP` shows what a merge would do",
        "-p": "progress is always shown; `chainmerge merge --quiet TOP` shows none",
        "-y": "this command does not ask: leave the option out",
    }
)
"""An option of other programs, or of other commands, and what is to be done instead."""

_SYNONYMS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "--into": "--base",
        "--output": "--json",
        "--rate-limit": "--bandwidth",
        "--silent": "--quiet",
        "--socket": "--qmp",
        "--speed": "--bandwidth",
        "--timeout": "--deadline",
        "--vm": "--domain",
    }
)


def usage_error(error: click.ClickException) -> WrongUsage:
    """Return what click objects to as an error of ours, with what may have been meant."""
    match error:
        case NoSuchWord(word=word, ctx=click.Context() as context):
            return WrongUsage(f"no such command {word!r}", _advice_for_command(word, context))
        case click.NoSuchOption(option_name=option, ctx=click.Context() as context):
            return WrongUsage(f"no such option {option!r}", _advice_for_option(option, context))
        case click.UsageError(ctx=click.Context() as context):
            return WrongUsage(error.format_message(), _see_help(context))
        case _:
            return WrongUsage(error.format_message(), "see `chainmerge --help`")


def _see_help(context: click.Context) -> str:
    return f"see `{context.command_path} --help`"


def _advice_for_command(word: str, context: click.Context) -> str:
    group = context.command
    assert isinstance(group, click.Group)
    advice = WORDS_OF_OTHERS.get(context.command_path, {}).get(word.lower())
    if advice is not None:
        return advice
    path = context.command_path
    meant = close_to(word.lower(), group.list_commands(context))
    return did_you_mean([f"{path} {name}" for name in meant]) or _see_help(context)


def _advice_for_option(option: str, context: click.Context) -> str:
    here = _options_of(context.command)
    meant = _SYNONYMS.get(option)
    if meant in here:
        return did_you_mean([meant])
    root = context.find_root()
    if option in _options_of(root.command):
        rest = context.command_path.removeprefix(f"{root.command_path} ")
        return f"it goes before the command: `{root.command_path} {option} {rest}`"
    if isinstance(context.command, click.Group):
        path = context.command_path
        return f"options go after the command: see `{path} --help` and `{path} COMMAND --help`"
    advice = OPTIONS_OF_OTHERS.get(option)
    return advice or did_you_mean(close_to(option, here)) or _see_help(context)


def _options_of(command: click.Command) -> list[str]:
    return [
        name
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for name in parameter.opts
    ]
