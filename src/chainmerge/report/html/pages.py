# SPDX-License-Identifier: Apache-2.0
"""Pages: one self-contained HTML file each."""

from __future__ import annotations

import shlex
from functools import cache
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from msgspec import Struct

from chainmerge.__about__ import __version__
from chainmerge.arithmetic.counting import counted
from chainmerge.documents.chain_pictures import ChainPictures
from chainmerge.documents.text import printable
from chainmerge.report.html import BEGINNING
from chainmerge.report.html.chain_view import ChainView, chain_view
from chainmerge.report.html.overview_view import OverviewView, overview_view
from chainmerge.report.html.palette import DARK, LIGHT, style_variables
from chainmerge.report.layout import Block, stack
from chainmerge.report.names import names_of_plan
from chainmerge.report.plain import plain_text
from chainmerge.report.plan_tables import answer
from chainmerge.report.text import moment

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.documents.chain_pictures import ChainsPictures
    from chainmerge.documents.plan import MergePlan


class _Page(Struct, frozen=True):
    """What the template shows."""

    title: str
    made: str
    said: tuple[str, ...]
    overview: OverviewView | None
    chains: tuple[ChainView, ...]


def html_of_chains(found: ChainsPictures) -> str:
    """Return the page about all chains of some places, with pictures of some of them."""
    return _rendered(
        _Page(
            title=f"Chains of {', '.join(found.places)}",
            made=_made(found.made_at),
            said=(),
            overview=overview_view(found),
            chains=tuple(
                chain_view(one, "", _answer(one.plan, command_for(one.plan)) if one.plan else ())
                for one in found.pictures
            ),
        )
    )


def html_of_plans(pictures: Sequence[ChainPictures], command: str, made_at: int) -> str:
    """Return the page about what a merge would do.

    Args:
        pictures: of each disk, with its plan.
        command: what carries it out.
        made_at: when the plans were made, in seconds since 1970.
    """
    return _rendered(
        _Page(
            title=f"Plan of a merge{_of_several(len(pictures))}",
            made=_made(made_at),
            said=(),
            overview=None,
            chains=tuple(
                chain_view(one, "", _answer(one.plan, command) if one.plan else ())
                for one in pictures
            ),
        )
    )


class DiskChange(Struct, frozen=True):
    """A disk before a merge and after it.

    Attributes:
        before: Its pictures with the plan; if there are none, why, or an empty text.
        after: Its pictures, and as above.
    """

    before: ChainPictures | str
    after: ChainPictures | str


def html_of_merge(disks: Sequence[DiskChange], report: Block, made_at: int) -> str:
    """Return the page about a merge.

    Args:
        disks: each of them, before and after.
        report: what the merge did, or that it has begun.
        made_at: when, in seconds since 1970.
    """
    return _rendered(
        _Page(
            title=f"Merge{_of_several(len(disks))}",
            made=_made(made_at),
            said=(
                *_lines(report),
                *(one for disk in disks for one in _sentences(disk)),
            ),
            overview=None,
            chains=tuple(view for disk in disks for view in _before_and_after(disk)),
        )
    )


def _sentences(disk: DiskChange) -> Iterator[str]:
    """Why there are no pictures."""
    yield from (one for one in (disk.before, disk.after) if isinstance(one, str) and one)


def _before_and_after(disk: DiskChange) -> Iterator[ChainView]:
    if not isinstance(disk.before, str):
        refusals = disk.before.plan.refusals if disk.before.plan else ()
        yield chain_view(disk.before, "Before", [f"REFUSED: {one.sentence}" for one in refusals])
    if not isinstance(disk.after, str):
        yield chain_view(disk.after, "After")


def _of_several(disks: int) -> str:
    return f" of {counted(disks, 'disk')}" if disks > 1 else ""


def command_for(plan: MergePlan) -> str:
    """Return the command for a merge that deletes what it has merged."""
    base, top = shlex.quote(plan.base), shlex.quote(plan.top)
    return f"chainmerge merge --delete --base {base} {top}"


def _answer(plan: MergePlan, command: str) -> tuple[str, ...]:
    return _lines(stack(*answer(plan, names_of_plan(plan), command)))


def _lines(block: Block) -> tuple[str, ...]:
    return tuple(plain_text(block).splitlines())


def _made(at: int) -> str:
    return f"chainmerge {__version__}, {moment(at)}"


def _rendered(page: _Page) -> str:
    return BEGINNING + _environment().get_template("page.html").render(page=page).lstrip() + "\n"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("chainmerge.report.html"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        # Of this package: there is nothing to escape.
        "light": Markup(style_variables(LIGHT)),  # noqa: S704
        "dark": Markup(style_variables(DARK)),  # noqa: S704
    }
    return environment


def _shown(value: object) -> object:
    """All text is printable; what is markup already was made so where it was drawn."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
