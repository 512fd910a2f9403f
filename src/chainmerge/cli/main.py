# SPDX-License-Identifier: Apache-2.0
"""The command ``chainmerge``: its sub-commands, and how it starts and ends."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import suppress
from itertools import takewhile
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NoReturn

import click

from chainmerge.__about__ import __version__
from chainmerge.cli.commands import (
    COMPLETION_VARIABLE,
    NO_FILES,
    LazyGroup,
    bug_report,
    traceback_of,
)
from chainmerge.cli.output import JsonOutput, TextOutput
from chainmerge.cli.signals import interrupted_by_signals
from chainmerge.cli.streams import prepare_streams, write_message
from chainmerge.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainmerge.cli.output import Output

_COMMANDS: Final = MappingProxyType(
    {
        "plan": ("chainmerge.cli.plan", "plan"),
        "merge": ("chainmerge.cli.merge", "merge"),
        "flatten": ("chainmerge.cli.flatten", "flatten"),
        "thin-out": ("chainmerge.cli.thin_out", "thin_out"),
        "live": ("chainmerge.cli.live", "live"),
        "status": ("chainmerge.cli.status", "status"),
        "cancel": ("chainmerge.cli.cancel", "cancel"),
        "bitmaps": ("chainmerge.cli.bitmaps", "bitmaps"),
        "relink": ("chainmerge.cli.relink", "relink"),
        "repair": ("chainmerge.cli.repair", "repair"),
        "scan": ("chainmerge.cli.scan", "scan"),
        "list": ("chainmerge.cli.list_chains", "list_chains"),
        "report": ("chainmerge.cli.report", "report"),
        "info": ("chainmerge.cli.info", "info"),
        "check": ("chainmerge.cli.check", "check"),
        "measure": ("chainmerge.cli.measure", "measure"),
        "config": ("chainmerge.cli.config", "config"),
        "fleet": ("chainmerge.cli.fleet.commands", "fleet"),
        "explain": ("chainmerge.cli.explain", "explain"),
        "completion": ("chainmerge.cli.completion", "completion"),
        "version": ("chainmerge.cli.version", "version"),
    }
)


_OBJECTS_BEFORE_COLLECTION: Final = 100_000


@click.group(
    cls=LazyGroup,
    commands_in=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "Exit status: 0 done and verified, 1 failed, 2 wrong usage, 3 refused and nothing "
        "changed, 4 outcome unknown, 5 something needs attention (status, scan --fail-on), 130 "
        "interrupted."
    ),
)
@click.version_option(__version__, "-V", "--version", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show where in the program an error came from.")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    help="Log what is done on standard error, a line a step, in place of progress.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="The least important lines of that log.  [default: info]",
)
@click.option(NO_FILES, is_flag=True, help="Take no options from configuration files.")
def cli(**_: object) -> None:  # read from the context, where they are needed
    """Merge snapshots of virtual disks, with their dirty bitmaps, without losing anything."""


def main() -> NoReturn:
    """Run the command that the process was started with, and end the process.

    The process ends at once: everything is written and closed by then, and an orderly shutdown of
    the interpreter would take a tenth of the time of a small command.
    """
    # Nearly all that a command allocates while it loads stays, so looking for garbage finds none.
    gc.set_threshold(_OBJECTS_BEFORE_COLLECTION)
    status = run(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


def run(arguments: Sequence[str]) -> int:
    """Run a command to its end and return its exit status."""
    prepare_streams()
    # numpy brings a library for linear algebra, which starts its threads when it is loaded. We
    # have nothing for them to do.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        with interrupted_by_signals():
            if asked := os.environ.get(COMPLETION_VARIABLE):
                from chainmerge.cli.shells import answer_shell  # noqa: PLC0415 (only for a shell)

                return answer_shell(asked, cli)
            status = cli.main(list(arguments), prog_name="chainmerge", standalone_mode=False)
    except click.ClickException as error:
        # Imported where it is used: most commands are typed right.
        from chainmerge.cli.usage import usage_error  # noqa: PLC0415

        _output_for(arguments).error(usage_error(error))
        return ExitCode.USAGE
    except (click.Abort, KeyboardInterrupt):
        write_message("chainmerge: interrupted\n")
        return ExitCode.INTERRUPTED
    except Exception as error:  # noqa: BLE001 (commands have their own; this is for their loading)
        _output_for(arguments).error(bug_report(error))
        if "--debug" in arguments:
            write_message(traceback_of(error))
        return ExitCode.FAILED
    return int(status or ExitCode.DONE)


def _output_for(arguments: Sequence[str]) -> Output:
    """Where an error goes that no command has met: none has read its options yet."""
    options = list(takewhile(lambda argument: argument != "--", arguments))
    return JsonOutput() if "--json" in options else TextOutput()
