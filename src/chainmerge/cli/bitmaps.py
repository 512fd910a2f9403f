# SPDX-License-Identifier: Apache-2.0
"""``chainmerge bitmaps``: looking after the bitmaps of images that nobody has open."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rich_click as click

from chainmerge import api
from chainmerge.cli.commands import Command, Group
from chainmerge.cli.options import (
    access_options,
    base_option,
    image_argument,
    json_option,
    top_argument,
)
from chainmerge.cli.params import IMAGE, SIZE
from chainmerge.report import tables

if TYPE_CHECKING:
    from chainmerge.cli.output import Output
    from chainmerge.options import Access


force_option = click.option(
    "--force", is_flag=True, help="Go on even where that makes a broken checkpoint look good."
)


@click.group(cls=Group)
def bitmaps() -> None:
    """List and change the persistent dirty bitmaps of images.

    A name that begins with a dash needs two dashes before it, alone: `remove disk.qcow2 -- -x`.
    """


@bitmaps.command("list", cls=Command)
@image_argument
@access_options
@json_option
def list_(*, image: str, access: Access, output: Output) -> None:
    """Show all bitmaps of IMAGE and the images below, and what they are worth to a backup."""
    output.document(api.bitmaps_list(image, access), tables.bitmap_listing)


@bitmaps.command(cls=Command)
@image_argument
@click.argument("name")
@click.option(
    "--granularity",
    type=SIZE,
    default=65536,
    show_default=True,
    help="Guest bytes that one bit stands for: a power of two.",
)
@click.option("--disabled", is_flag=True, help="Do not let it record writes.")
@access_options
@json_option
def add(
    *,
    image: str,
    name: str,
    granularity: int,
    disabled: bool,
    access: Access,
    output: Output,
) -> None:
    """Add an empty bitmap NAME to IMAGE."""
    change = api.bitmaps_add(image, name, granularity, enabled=not disabled, access=access)
    output.document(change, tables.bitmap_change)


@bitmaps.command(cls=Command)
@image_argument
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@force_option
@access_options
@json_option
def remove(
    *,
    image: str,
    names: tuple[str, ...],
    force: bool,
    access: Access,
    output: Output,
) -> None:
    """Remove the bitmaps NAME... from IMAGE."""
    change = api.bitmaps_remove(image, names, access=access, force=force)
    output.document(change, tables.bitmap_change)


@bitmaps.command(cls=Command)
@image_argument
@force_option
@access_options
@json_option
def clear(*, image: str, force: bool, access: Access, output: Output) -> None:
    """Remove all bitmaps from IMAGE."""
    change = api.bitmaps_clear(image, access, force=force)
    output.document(change, tables.bitmap_change)


@bitmaps.command(cls=Command)
@top_argument
@base_option
@access_options
@json_option
def prune(*, top: str, base: str | None, access: Access, output: Output) -> None:
    """Remove stale and broken bitmaps from BASE up to TOP.

    With --active LEAF, names that are broken are removed from the whole chain, its top
    end first.
    """
    output.document(api.prune(top, base, access), tables.prune_report)


@bitmaps.command(cls=Command)
@image_argument
@click.argument("target")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option("--from", "source_image", type=IMAGE, help="The image that holds the sources.")
@access_options
@json_option
def merge(
    *,
    image: str,
    target: str,
    sources: tuple[str, ...],
    source_image: str | None,
    access: Access,
    output: Output,
) -> None:
    """Add the bits of the bitmaps SOURCE... to the bitmap TARGET of IMAGE."""
    change = api.bitmaps_merge(image, target, sources, source_image=source_image, access=access)
    output.document(change, tables.bitmap_change)
