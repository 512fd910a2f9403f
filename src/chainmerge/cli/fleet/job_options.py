# SPDX-License-Identifier: Apache-2.0
"""Options of a command that plans jobs: what they do, how, and when."""

from __future__ import annotations

import re
from functools import wraps
from typing import TYPE_CHECKING, Any, Final, get_args

import click

from chainmerge.cli.commands import PanelOption
from chainmerge.cli.options import merging_option, with_options
from chainmerge.cli.params import DURATION, SIZE
from chainmerge.fleet.record import WINDOW_PATTERN, Action, JobOptions
from chainmerge.options import (
    DataChoice,
    DirectionChoice,
    EngineChoice,
    StallChoice,
    VerifyLevel,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_DEFAULTS: Final = JobOptions()
_FIELDS: Final = JobOptions.__struct_fields__
_COLD_ACTIONS: Final = [action.value for action in Action if action is not Action.LIVE_MERGE]


def _option(panel: str, *names: str, **attributes: Any) -> Callable[..., Any]:
    return click.option(*names, cls=PanelOption, panel=panel, **attributes)


def _windows(
    context: click.Context, parameter: click.Parameter, windows: tuple[str, ...]
) -> tuple[str, ...]:
    del context, parameter
    for window in windows:
        if not re.match(WINDOW_PATTERN, window):
            raise click.BadParameter(f"{window!r} is not as 22:00-05:00")
    return windows


def _choice(option: str, kind: Any, default: str, meaning: str) -> Callable[..., Any]:
    choice = click.Choice(get_args(kind))
    return merging_option(option, type=choice, default=default, show_default=True, help=meaning)


_WHAT: Final = "What to do"
_WHEN: Final = "When to do it"
_STAYS: Final = "Which snapshots stay"
_ACTION_OPTIONS: Final = (
    _option(
        _WHAT,
        "--action",
        type=click.Choice(_COLD_ACTIONS),
        default=Action.MERGE.value,
        show_default=True,
        help="Merge TOP into its backing file, prune the bitmaps of that, thin out the snapshots "
        "below TOP, or repair TOP.",
    ),
    _option(
        _WHAT,
        "--together",
        is_flag=True,
        help="All TOPs are disks of one virtual machine: one job merges them.",
    ),
    _option(
        _WHAT,
        "--domain",
        metavar="NAME",
        help="Have this domain merge while it runs, by one job that follows it to other hosts; "
        "without a TOP, what its guest writes to on each disk.",
    ),
)
_TIMING_OPTIONS: Final = (
    _option(
        _WHEN,
        "--priority",
        type=click.IntRange(-1000, 1000),
        default=0,
        show_default=True,
        help="The highest goes first.",
    ),
    _option(
        _WHEN,
        "--window",
        "windows",
        multiple=True,
        callback=_windows,
        metavar="HH:MM-HH:MM",
        help="Start only in this window, by the host's clock, such as 22:00-05:00; may be given "
        "several times.",
    ),
    _option(
        _WHEN,
        "--window-end",
        type=click.Choice(["go-on", "stop"]),
        default="go-on",
        show_default=True,
        help="What runs when its window ends goes on, or stops at the next safe point and goes on "
        "in the next window.",
    ),
)
_JOB_OPTIONS: Final = (
    _choice("--verify", VerifyLevel, _DEFAULTS.verify, "How much to verify afterwards."),
    merging_option("--delete", is_flag=True, help="Delete the merged images once it is verified."),
    merging_option("--keep-name", is_flag=True, help="Give the result the name of TOP."),
    _choice("--engine", EngineChoice, _DEFAULTS.engine, "Which engine writes the data."),
    _choice("--direction", DirectionChoice, _DEFAULTS.direction, "Which way the data moves."),
    _choice("--data", DataChoice, _DEFAULTS.data, "Where data goes if base has a cluster for it."),
    merging_option("--detect-zeroes", is_flag=True, help="Turn zeros into zero clusters."),
    merging_option("--discard", is_flag=True, help="Discard what was freed on the volume."),
    merging_option(
        "--bandwidth",
        type=SIZE,
        metavar="RATE",
        help="Copy at most this many bytes per second, such as 100M.",
    ),
    merging_option(
        "--deadline",
        type=click.FloatRange(min=0, max=86400 * 365),
        metavar="SECONDS",
        help="In a VM: how long the copy may take to catch up with what the guest writes.",
    ),
    _choice("--on-stall", StallChoice, _DEFAULTS.on_stall, "What to do if it does not."),
    merging_option(
        "--sole-user",
        is_flag=True,
        help="Only the images that were found use those of the chain; nobody else does.",
    ),
    _option(
        _STAYS,
        "--keep-last",
        type=click.IntRange(min=0),
        metavar="N",
        help="Keep the last N snapshots.",
    ),
    _option(
        _STAYS,
        "--keep-within",
        type=DURATION,
        metavar="AGE",
        help="Keep snapshots that are not older than this, such as 7d.",
    ),
    _option(
        _STAYS,
        "--keep",
        multiple=True,
        metavar="PATTERN",
        help="Keep snapshots whose image has a file name like this.",
    ),
    _option(
        _STAYS,
        "--keep-checkpoints",
        is_flag=True,
        help="Keep the snapshots at which a checkpoint begins that backups can use, too.",
    ),
)


def action_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add what jobs do: the command gets ``action``, ``together`` and ``domain``."""
    return with_options(function, _ACTION_OPTIONS)


def timing_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add when they do it; the command gets ``timing``, a JobTiming."""

    @wraps(function)
    def command(
        *args: Any, priority: int, windows: tuple[str, ...], window_end: Any, **kwargs: Any
    ) -> Any:
        # Planning needs most of the program.
        from chainmerge.fleet.planning import JobTiming  # noqa: PLC0415

        return function(*args, timing=JobTiming(priority, windows, window_end), **kwargs)

    return with_options(command, _TIMING_OPTIONS)


def job_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add how they do it; the command gets ``options``, the JobOptions."""

    @wraps(function)
    def command(*args: Any, **kwargs: Any) -> Any:
        options = JobOptions(**{name: kwargs.pop(name) for name in _FIELDS})
        return function(*args, options=options, **kwargs)

    return with_options(command, _JOB_OPTIONS)
