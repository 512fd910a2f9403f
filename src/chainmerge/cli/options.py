# SPDX-License-Identifier: Apache-2.0
"""Options that commands share, each group given to a command as one object."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial, wraps
from typing import Any, Final, ParamSpec, TypeVar, get_args

import click

from chainmerge.cli.commands import PanelOption
from chainmerge.cli.output import JsonOutput, Output, TextOutput
from chainmerge.cli.params import DIRECTORY, IMAGE, KEY_FILE, PATH_FORMAT, SIZE
from chainmerge.options import (
    Access,
    DataChoice,
    DirectionChoice,
    EngineChoice,
    MergeOptions,
    VerifyLevel,
    VolumeChoice,
)

P = ParamSpec("P")
R = TypeVar("R")
Function = Callable[..., R]

_ACCESS_FIELDS: Final = (
    "formats",
    "allow_backing",
    "allow_data_file",
    "search",
    "sole_user",
    "active",
    "lock_wait",
    "lock_command",
)
_reaching_option: Final = partial(click.option, cls=PanelOption, panel="Reaching images")
merging_option: Final = partial(click.option, cls=PanelOption, panel="How to merge")
_MERGE_FIELDS: Final = MergeOptions.__struct_fields__


def _choose_output(ctx: click.Context, _param: click.Parameter, value: bool) -> Output:  # noqa: FBT001 (click's signature)
    root = ctx.find_root().params
    log_format, level = root.get("log_format"), root.get("log_level")
    if log_format is None and level is None:
        return JsonOutput() if value else TextOutput()
    # Imported where it is used: few commands keep a log.
    from chainmerge.cli.log_output import logged_json, logged_tables  # noqa: PLC0415

    logged = logged_json if value else logged_tables
    return logged(log_format or "text", level or "info")


json_option = click.option(
    "--json",
    "output",
    is_flag=True,
    callback=_choose_output,
    help="Print JSON instead of tables, errors included.",
)

_quiet_option: Final = click.option(
    "-q",
    "--quiet",
    is_flag=True,
    help="Print only errors and warnings, no progress; nothing if all is well.",
)


def outcome_options(function: Function[R]) -> Function[R]:
    """Add --quiet and --json to a command that changes something; it gets ``output``."""

    @wraps(function)
    def command(*args: Any, output: Output, quiet: bool, **kwargs: Any) -> R:
        return function(*args, output=output.quieter() if quiet else output, **kwargs)

    return with_options(command, (_quiet_option, json_option))


verbose_option: Final = click.option(
    "-v",
    "--verbose",
    is_flag=True,
    help="Also show exact bytes, the space needed, all reasons and warnings in full.",
)
dry_run_option: Final = click.option(
    "-n", "--dry-run", is_flag=True, help="Show the plan and change nothing."
)

report_option: Final = click.option(
    "--report",
    "report_file",
    type=click.Path(),
    metavar="FILE",
    help="Also draw it in this HTML file; an older report of that name is replaced.",
)

top_argument = click.argument("top", type=IMAGE)
image_argument = click.argument("image", type=IMAGE)
tops_argument = click.argument("tops", metavar="TOP...", type=IMAGE, nargs=-1, required=True)
tops_to_find_argument = click.argument("tops", metavar="[TOP]...", type=IMAGE, nargs=-1)
bases_option = click.option(
    "--base",
    "bases",
    type=IMAGE,
    multiple=True,
    help="The image to merge into: any image below TOP; once for each TOP, in the same order.  "
    "[default: TOP's backing file]",
)
base_option = click.option(
    "--base",
    type=IMAGE,
    help="The image to merge into: any image below TOP.  [default: TOP's backing file]",
)


def with_options(
    command: Function[R], options: Iterable[Callable[[Function[R]], Function[R]]]
) -> Function[R]:
    """Add options to a command, so that its help shows them in their order."""
    for option in reversed(tuple(options)):
        command = option(command)
    return command


lock_command_option: Final = _reaching_option(
    "--lock-command",
    metavar="COMMAND",
    help="The site's command that locks volumes for this host: it is run with lock or unlock and "
    "the block devices that are written to.",
)
_ACCESS_OPTIONS: Final = (
    _reaching_option(
        "--format",
        "formats",
        type=PATH_FORMAT,
        multiple=True,
        metavar="PATH=FORMAT",
        help="The format of an image, if no image above declares it.",
    ),
    _reaching_option(
        "--allow-backing",
        type=DIRECTORY,
        multiple=True,
        metavar="DIR",
        help="A directory where backing files may lie, besides those of the chain.",
    ),
    _reaching_option(
        "--allow-data-file",
        type=click.Path(),
        multiple=True,
        metavar="FILE",
        help="An external data file that may be used.",
    ),
    _reaching_option(
        "--search",
        type=DIRECTORY,
        multiple=True,
        metavar="DIR",
        help="A directory that may hold, at any depth, other images that use those of the chain.",
    ),
    _reaching_option(
        "--sole-user",
        is_flag=True,
        help="Only the images that were found use those of the chain; nobody else does.",
    ),
    _reaching_option("--active", type=IMAGE, metavar="LEAF", help="The chain's active layer."),
    _reaching_option(
        "--lock-wait",
        type=click.FloatRange(min=0, max=86400),
        metavar="SECONDS",
        default=Access().lock_wait,
        show_default=True,
        help="How long to wait for images that are locked.",
    ),
    lock_command_option,
    _reaching_option(
        "--activate",
        is_flag=True,
        help="Activate the chain's logical volumes if needed, and those beside them to see what "
        "they hold, and deactivate them afterwards.",
    ),
)


def access_options(function: Function[R]) -> Function[R]:
    """Add the options that say how images may be reached; the command gets ``access``."""

    @wraps(function)
    def command(*args: Any, activate: bool, **kwargs: Any) -> R:
        chosen = {name: kwargs.pop(name) for name in _ACCESS_FIELDS}
        chosen["formats"] = dict(chosen["formats"])
        access = Access(**chosen, activate=activate)
        with contextlib.ExitStack() as stack:
            if activate:
                _activate_volumes(stack, access, kwargs)
            return function(*args, access=access, **kwargs)

    return with_options(command, _ACCESS_OPTIONS)


def _activate_volumes(
    stack: contextlib.ExitStack, access: Access, arguments: Mapping[str, Any]
) -> None:
    """Have the volumes of the chains that a command is for active until *stack* is closed."""
    # Few commands need it.
    from chainmerge.chain.activation import neighbours_activated, volumes_activated  # noqa: PLC0415
    from chainmerge.chain.target import metadata_policy_of  # noqa: PLC0415

    top = arguments.get("top") or arguments.get("leaf")
    tops = arguments.get("tops") or tuple(filter(None, (top,)))
    named = (*tops, *arguments.get("bases", ()), arguments.get("base"))
    policy = metadata_policy_of(access, *named)
    images = arguments.get("images") or tuple(filter(None, (arguments.get("image"),)))
    for top in (access.active,) if access.active else tops or images:
        stack.enter_context(volumes_activated(top, policy))
    # What stands on an image matters where base is going to be changed.
    for top in tops:
        stack.enter_context(neighbours_activated(top, policy))


def named_places_options(function: Function[R]) -> Function[R]:
    """Add the options that say what of images may be followed to other directories, and how."""
    return with_options(function, _ACCESS_OPTIONS[:2])


history_option: Final = click.option(
    "--history/--no-history",
    default=True,
    help="Whether to use this host's history, and keep a line in it.  [default: use it]",
)
extend_pool_option: Final = merging_option(
    "--extend-pool",
    is_flag=True,
    help="Extend the pool of a thin volume first if it may not have what the merge writes.",
)
_DEFAULTS: Final = MergeOptions()
_MERGE_OPTIONS: Final = (
    merging_option(
        "--verify",
        type=click.Choice(get_args(VerifyLevel)),
        default=_DEFAULTS.verify,
        show_default=True,
        help="Also compare base's content with top's (full), or check only bitmaps and metadata.",
    ),
    merging_option(
        "--delete",
        is_flag=True,
        help="Delete the merged images once everything is verified, with their data files and with "
        "links that would lead nowhere.",
    ),
    merging_option(
        "--keep-name",
        is_flag=True,
        help="Give the result the name of TOP, in place of TOP's file or logical volume.",
    ),
    merging_option(
        "--drop-bitmaps",
        is_flag=True,
        help="Go on even if base cannot hold bitmaps: the next backup must be a full one.",
    ),
    merging_option(
        "--drop-snapshots",
        is_flag=True,
        help="Delete internal snapshots that would show other data, or be lost with their image.",
    ),
    merging_option(
        "--despite-newer-base",
        is_flag=True,
        help="Go on even if BASE already holds most of TOP and was written later: what was written "
        "to it since is overwritten.",
    ),
    merging_option(
        "--engine",
        type=click.Choice(get_args(EngineChoice)),
        default=_DEFAULTS.engine,
        show_default=True,
        help="Which engine writes the data.",
    ),
    merging_option(
        "--direction",
        type=click.Choice(get_args(DirectionChoice)),
        default=_DEFAULTS.direction,
        show_default=True,
        help="Move TOP's data down into BASE (commit), or what TOP lacks up from BASE (pull), "
        "which leaves BASE as it is.",
    ),
    merging_option(
        "--data",
        type=click.Choice(get_args(DataChoice)),
        default=_DEFAULTS.data,
        show_default=True,
        help="Where data goes if base already has a cluster for it: to a new one (cow), or over "
        "the old one (in-place), which needs no second copy.",
    ),
    merging_option(
        "--detect-zeroes",
        is_flag=True,
        help="Read all data that moves beforehand, and turn zeros into zero clusters.",
    ),
    merging_option(
        "--bandwidth",
        type=SIZE,
        metavar="RATE",
        help="Copy at most this many bytes per second, such as 100M.",
    ),
    merging_option(
        "--size-limit",
        type=SIZE,
        metavar="SIZE",
        help="Treat base's file as a volume that cannot grow past SIZE.",
    ),
    merging_option(
        "--volume",
        type=click.Choice(get_args(VolumeChoice)),
        default=_DEFAULTS.volume,
        show_default=True,
        help="What kind of volume base lies on.",
    ),
    extend_pool_option,
    merging_option(
        "--shrink",
        is_flag=True,
        help="Reduce the logical volume afterwards to what the merge needed, and --leave.",
    ),
    merging_option(
        "--leave",
        type=SIZE,
        metavar="SIZE",
        help="What a reduced volume keeps beyond that.  [default: 1G if the guest writes to the "
        "result, otherwise nothing]",
    ),
    merging_option("--discard", is_flag=True, help="Discard what was freed on the volume."),
    merging_option(
        "--reclaim",
        is_flag=True,
        help="Give back all leaked clusters of the image that is written, not only those of "
        "earlier merges. They may hold the data that a lost table mapped: see the plan.",
    ),
    _reaching_option(
        "--key-file",
        "key_files",
        type=KEY_FILE,
        multiple=True,
        metavar="[IMAGE=]FILE",
        help="A file with the passphrase of an encrypted image, or of all of them.",
    ),
    history_option,
)


def merge_options(function: Function[R]) -> Function[R]:
    """Add the options that say how to merge; the command gets ``options``."""

    @wraps(function)
    def command(*args: Any, **kwargs: Any) -> R:
        chosen = {name: kwargs.pop(name) for name in _MERGE_FIELDS}
        chosen["key_files"] = dict(chosen["key_files"])
        return function(*args, options=MergeOptions(**chosen), **kwargs)

    return with_options(command, _MERGE_OPTIONS)
