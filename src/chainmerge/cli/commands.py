# SPDX-License-Identifier: Apache-2.0
"""Commands that are imported when they are called, and the one place that ends them.

Every error of the API ends in :meth:`Command.invoke`: it becomes a sentence, a hint and
an exit status there. Nothing else in the command line catches errors of the API.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from typing import TYPE_CHECKING, Any, Final

import click
from click.exceptions import Exit

from chainmerge.cli.errors import InternalError, ReportNotDelivered
from chainmerge.cli.output import Output, TextOutput
from chainmerge.cli.settings import SETTINGS, negation_of, places_in_force, section_of
from chainmerge.cli.streams import write_message
from chainmerge.documents.text import printable
from chainmerge.errors import ChainmergeError, ExitCode, Failed
from chainmerge.storage.errors import OutOfMemory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from click.shell_completion import CompletionItem

# What the dynamic linker says, and numpy and others that see no more than an error of importing.
_NO_MEMORY: Final = ("failed to map segment", "Cannot allocate memory", "cannot allocate memory")

COMPLETION_VARIABLE: Final = "_CHAINMERGE_COMPLETE"
"""In the environment: what a shell wants to know that completes a word."""

NO_FILES: Final = "--no-config"
"""Before a command: let it take nothing from configuration files."""
_FILES_IN_FORCE: Final = "chainmerge.files_in_force"
_FILES_UNUSABLE: Final = "chainmerge.files_unusable"

# What click raises to end a command, in an orderly way.
_CLICK_ENDINGS: Final = (click.ClickException, Exit, click.Abort)


class PanelOption(click.Option):
    """An option that help shows in the panel of a name, with others of its kind."""

    def __init__(self, *args: Any, panel: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.panel = panel


class Command(click.Command):
    """A command whose errors become a sentence, a hint and an exit status."""

    def get_help(self, ctx: click.Context) -> str:
        return _formatted_help(self, ctx)

    def make_parser(self, ctx: click.Context) -> Any:
        parser = super().make_parser(ctx)
        for option in self.params:
            if isinstance(option, click.Option) and not option.secondary_opts:
                negation = negation_of(option)
                if negation is not None:
                    parser.add_option(
                        option, [negation], option.name, action="store_const", const=False
                    )
        return parser

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # A shell that completes a word has no use for it.
        if not ctx.resilient_parsing:
            _configure(self, ctx)
        return super().parse_args(ctx, args)

    def advised(self, ctx: click.Context, error: ChainmergeError) -> ChainmergeError:
        """Return the same error, with what this command knows to do about it."""
        del ctx
        return error

    def invoke(self, ctx: click.Context) -> Any:
        output: Output = ctx.params.get("output") or TextOutput()
        try:
            with _repeating_what_was_decided(ctx):
                return super().invoke(ctx)
        except _CLICK_ENDINGS:
            raise
        except ChainmergeError as error:
            return _end(ctx, output, self.advised(ctx, error))
        except Exception as error:  # noqa: BLE001 (the last place that knows how to answer)
            return _end(ctx, output, bug_report(error))


def _configure(command: click.Command, ctx: click.Context) -> None:
    """Let a command take options from configuration files, where there are any.

    What is wrong with them is kept until the command is to run: help is given without.
    """
    section = section_of(ctx.command_path)
    without = ctx.find_root().params.get("no_config", False)
    ctx.meta[_FILES_IN_FORCE] = without or bool(places_in_force(os.environ))
    if without or section not in SETTINGS or not ctx.meta[_FILES_IN_FORCE]:
        return
    # Imported where they are used: most machines have no configuration.
    from chainmerge.cli.configuration import settings_in_force  # noqa: PLC0415
    from chainmerge.cli.configured import defaults_from  # noqa: PLC0415

    try:
        settings = settings_in_force(os.environ)
        ctx.default_map = defaults_from(settings, section, command, ctx)
    except ChainmergeError as error:
        ctx.meta[_FILES_UNUSABLE] = error


@contextlib.contextmanager
def _repeating_what_was_decided(ctx: click.Context) -> Iterator[None]:
    """Have commands that repeat what was recorded take nothing from configuration files.

    Raises what was wrong with those.
    """
    if not ctx.meta.get(_FILES_IN_FORCE):
        yield
        return
    if _FILES_UNUSABLE in ctx.meta:
        raise ctx.meta[_FILES_UNUSABLE]
    # Imported where it is used, as above.
    from chainmerge.records.request import repeated_by  # noqa: PLC0415

    with repeated_by("chainmerge", NO_FILES):
        yield


def _formatted_help(command: click.Command, context: click.Context) -> str:
    # Imported where it is used: that takes longer than a small merge.
    from chainmerge.cli.help import formatted_help  # noqa: PLC0415

    return formatted_help(command, context)


def bug_report(error: Exception) -> Failed:
    """Turn an unexpected exception into an error for the user."""
    # Parts of the program are loaded when they are needed, which takes memory too.
    said = str(error)
    if isinstance(error, MemoryError) or any(words in said for words in _NO_MEMORY):
        return OutOfMemory()
    bug = InternalError(type(error).__name__, str(error))
    bug.__cause__ = error
    return bug


def _end(ctx: click.Context, output: Output, error: ChainmergeError) -> ExitCode:
    if ctx.find_root().params.get("debug"):
        write_message(traceback_of(error))
    # What standard output does not take goes to standard error.
    voice = TextOutput() if isinstance(error, ReportNotDelivered) else output
    try:
        voice.error(error)
    except ReportNotDelivered as undelivered:
        TextOutput().error(error)
        TextOutput().error(undelivered)
    return error.exit_code


def traceback_of(error: BaseException) -> str:
    """Return where an exception came from, fit to be printed."""
    import traceback  # noqa: PLC0415 (only where somebody debugs)

    lines = "".join(traceback.format_exception(error)).splitlines()
    return "".join(f"{printable(line)}\n" for line in lines)


class NoSuchWord(click.UsageError):
    """A group of commands has none of this name."""

    def __init__(self, word: str, ctx: click.Context) -> None:
        super().__init__(f"no such command {word!r}", ctx)
        self.word = word


class Group(click.Group):
    """A group of commands that shows what it holds when none is named."""

    def get_help(self, ctx: click.Context) -> str:
        return _formatted_help(self, ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # A shell that completes a word has no use for help.
        if not args and not ctx.resilient_parsing:
            # What click does of itself here differs between its versions.
            click.echo(ctx.get_help(), err=True, color=ctx.color)
            ctx.exit(ExitCode.USAGE)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if not ctx.resilient_parsing and self.get_command(ctx, args[0]) is None:
            raise NoSuchWord(args[0], ctx)
        return super().resolve_command(ctx, args)


class LazyGroup(Group):
    """A group of commands, each imported when it is needed.

    ``commands_in`` names, for each command, the module and the function that it is. Those that are
    added to the group besides are there already.
    """

    def __init__(
        self, *args: Any, commands_in: Mapping[str, tuple[str, str]], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._commands_in = commands_in

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *self._commands_in]

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[str]]:
        from click.shell_completion import CompletionItem  # noqa: PLC0415 (only for a shell)

        # Not as click.Group does it, which would import all commands for what they say of
        # themselves.
        names = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        options = click.Command.shell_complete(self, ctx, incomplete)
        return [*map(CompletionItem, names), *options]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._commands_in:
            return super().get_command(ctx, cmd_name)
        module, function = self._commands_in[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), function)
        return command
