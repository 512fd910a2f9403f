# SPDX-License-Identifier: Apache-2.0
"""Pages about a fleet: what its hosts have, and what is to be done there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.report.html.fleet_view import chains_of_fleet, fleet_view, plan_view
from chainmerge.report.html.overview_view import overview_view
from chainmerge.report.html.pages import Page, made, rendered

if TYPE_CHECKING:
    from chainmerge.documents.fleet_inventory import FleetPictures
    from chainmerge.report.fleet_plan_view import FleetPlanView


def html_of_fleet(found: FleetPictures) -> str:
    """Return the page about all hosts and their chains."""
    return rendered(
        Page(
            title="Fleet",
            made=made(found.made_at),
            said=(),
            overview=overview_view(chains_of_fleet(found)),
            chains=(),
            fleet=fleet_view(found),
        )
    )


def html_of_fleet_plan(plan: FleetPlanView) -> str:
    """Return the page about a plan."""
    return rendered(
        Page(
            title="Plan of a fleet",
            made=made(plan.made_at),
            said=(),
            overview=None,
            chains=(),
            fleet=plan_view(plan),
        )
    )
