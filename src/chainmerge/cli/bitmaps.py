# SPDX-License-Identifier: Apache-2.0
"""``chainmerge bitmaps``: looking after the bitmaps of images that nobody has open."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from msgspec.structs import replace

from chainmerge import api
from chainmerge.cli.candidates import bitmap_candidates
from chainmerge.cli.commands import Command, Group
from chainmerge.cli.errors import NotConfirmed
from chainmerge.cli.options import (
    access_options,
    base_option,
    image_argument,
    json_option,
    outcome_options,
)
from chainmerge.cli.output import show_before_asking
from chainmerge.cli.params import DOMAIN, IMAGE, SIZE
from chainmerge.documents.text import printable
from chainmerge.report import tables
from chainmerge.report.bitmap_tables import bitmaps_repair_report

if TYPE_CHECKING:
    from chainmerge.cli.output import Output
    from chainmerge.options import Access


domain_option = click.option(
    "--domain",
    metavar="NAME",
    type=DOMAIN,
    help="All disks of this libvirt domain that can have bitmaps.",
)
connect_option = click.option("--connect", metavar="URI", help="The libvirt that knows the domain.")
force_option = click.option(
    "--force", is_flag=True, help="Go on even if that makes a broken checkpoint look valid."
)


@click.group(cls=Group)
def bitmaps() -> None:
    """List and change the persistent dirty bitmaps of images.

    A name that begins with a dash must come after a separate `--`: `remove disk.qcow2 -- -x`.
    """


qmp_option = click.option(
    "--qmp",
    type=click.Path(),
    metavar="SOCKET",
    help="All disks of the running VM with this QMP socket that can have bitmaps.",
)


def require_one_way(
    images: tuple[str, ...], domain: str | None, connect: str | None, qmp: str | None = None
) -> None:
    """Raise UsageError unless either images are named, or one VM."""
    if [bool(images), domain is not None, qmp is not None].count(True) != 1:
        raise click.UsageError("name either images or one VM")
    if connect is not None and domain is None:
        raise click.UsageError("--connect needs --domain")


@bitmaps.command("list", cls=Command)
@click.argument("images", metavar="[IMAGE]...", type=IMAGE, nargs=-1)
@domain_option
@connect_option
@qmp_option
@access_options
@json_option
def list_(
    *,
    images: tuple[str, ...],
    domain: str | None,
    connect: str | None,
    qmp: str | None,
    access: Access,
    output: Output,
) -> None:
    """Show all bitmaps of IMAGE and the images below, and which of them a backup can use.

    Of several disks, of a libvirt domain, running or not, or of a running VM: which checkpoints a
    backup of all its disks can use.
    """
    require_one_way(images, domain, connect, qmp)
    if domain is not None or qmp is not None:
        # Few commands need a running VM.
        from chainmerge import live  # noqa: PLC0415

        if domain is not None:
            found = live.bitmaps_list_domain(domain, connect or live.DEFAULT_URI, access)
        else:
            found = live.bitmaps_list_vm(str(qmp))
        output.document(found, tables.bitmaps_of_disks)
    elif len(images) == 1:
        output.document(api.bitmaps_list(images[0], access), tables.bitmap_listing)
    else:
        output.document(api.bitmaps_list_disks(images, access), tables.bitmaps_of_disks)


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
@outcome_options
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
@click.argument("names", metavar="[NAME]...", nargs=-1, shell_complete=bitmap_candidates)
@click.option("--all", "all_of_them", is_flag=True, help="Remove all bitmaps that IMAGE has.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask before --all.")
@force_option
@access_options
@outcome_options
def remove(
    *,
    image: str,
    names: tuple[str, ...],
    all_of_them: bool,
    yes: bool,
    force: bool,
    access: Access,
    output: Output,
) -> None:
    """Remove the bitmaps NAME... from IMAGE.

    The next backup that builds on one of them must be a full one.
    """
    if bool(names) == all_of_them:
        raise click.UsageError("name the bitmaps to remove, or give --all")
    if not all_of_them:
        change = api.bitmaps_remove(image, names, access=access, force=force)
    else:
        if not yes:
            _ask_before_removing_all(image, access)
        change = api.bitmaps_remove_all(image, access, force=force)
    output.document(change, tables.bitmap_change)


def _ask_before_removing_all(image: str, access: Access) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError("--all asks first, and there is no terminal: add --yes")
    listing = api.bitmaps_list(image, replace(access, active=None))
    there = [row.name for row in listing.rows if Path(row.image) == Path(image).absolute()]
    question = (
        f"Remove {', '.join(map(repr, there)) or 'no bitmap'} from {image}? "
        "The next backup that builds on them must be a full one"
    )
    if not click.confirm(printable(question), err=True):
        raise NotConfirmed(image)


@bitmaps.command(cls=Command)
@image_argument
@click.argument("names", metavar="NAME...", nargs=-1, shell_complete=bitmap_candidates)
@click.option("--force", is_flag=True, help="Go on even if other images have the name too.")
@access_options
@outcome_options
def clear(
    *, image: str, names: tuple[str, ...], force: bool, access: Access, output: Output
) -> None:
    """Clear the bitmaps NAME... of IMAGE: they stay, but forget what they have recorded.

    A backup that builds on one of them then has only what is written from now on: take one right
    before. To remove bitmaps, use `remove`.
    """
    if not names:
        raise click.UsageError(
            "name the bitmaps to clear; to remove all of them: chainmerge bitmaps remove IMAGE "
            "--all"
        )
    change = api.bitmaps_clear(image, names, access, force=force)
    output.document(change, tables.bitmap_change)


@bitmaps.command(cls=Command)
@click.argument("tops", metavar="[TOP]...", type=IMAGE, nargs=-1)
@base_option
@domain_option
@connect_option
@access_options
@outcome_options
def prune(
    *,
    tops: tuple[str, ...],
    base: str | None,
    domain: str | None,
    connect: str | None,
    access: Access,
    output: Output,
) -> None:
    """Remove stale and broken bitmaps from BASE up to TOP.

    With --active LEAF, broken names are removed from the whole chain, the active image first. Of
    several disks, nothing is changed on any unless all can be pruned. With --domain, which must
    not run, broken names are removed from the chains of all its disks.
    """
    require_one_way(tops, domain, connect)
    if len(tops) != 1 and (base or access.active):
        raise click.UsageError("--base and --active are for one disk")
    if domain is not None:
        # As above.
        from chainmerge import live  # noqa: PLC0415

        done = live.prune_domain(domain, connect or live.DEFAULT_URI, access)
        output.document(done, tables.prune_of_disks)
    elif len(tops) == 1:
        output.document(api.prune(tops[0], base, access), tables.prune_report)
    else:
        output.document(api.prune_disks(tops, access), tables.prune_of_disks)


@bitmaps.command(cls=Command)
@click.argument("leaf", type=IMAGE)
@click.argument("names", metavar="[NAME]...", nargs=-1, shell_complete=bitmap_candidates)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("-n", "--dry-run", is_flag=True, help="Show what would be done and change nothing.")
@access_options
@outcome_options
def repair(
    *,
    leaf: str,
    names: tuple[str, ...],
    yes: bool,
    dry_run: bool,
    access: Access,
    output: Output,
) -> None:
    """Drop unusable bitmaps from LEAF, the active image, and from all images below.

    Those are the bitmaps that are inconsistent (in-use) in some image, and checkpoints that are
    incomplete. Shows them, and asks. The next backup must be a full one. With NAME..., drops only
    these, if they are unusable.
    """
    if yes and dry_run:
        raise click.UsageError("--yes and --dry-run contradict each other")
    if not yes:
        planned = api.plan_bitmaps_repair(leaf, names, access)
        if dry_run or not planned.unusable:
            output.document(planned, bitmaps_repair_report)
            return
        if not sys.stdin.isatty():
            raise click.UsageError("bitmaps repair asks first, and there is no terminal: add --yes")
        show_before_asking(planned, bitmaps_repair_report)
        if not click.confirm("Drop them", err=True):
            raise NotConfirmed(leaf)
    output.document(api.bitmaps_repair(leaf, names, access), bitmaps_repair_report)


@bitmaps.command(cls=Command)
@image_argument
@click.argument("target", shell_complete=bitmap_candidates)
@click.argument(
    "sources",
    metavar="SOURCE...",
    nargs=-1,
    required=True,
    shell_complete=bitmap_candidates,
)
@click.option("--from", "source_image", type=IMAGE, help="The image that holds the sources.")
@access_options
@outcome_options
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
