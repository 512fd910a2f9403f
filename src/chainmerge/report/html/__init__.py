# SPDX-License-Identifier: Apache-2.0
"""Documents as one HTML file: no script, nothing from a network, fit for paper, dark and light.

:mod:`chainmerge.report.html.pages` has the pages. Names in them come from images, that is, perhaps
from a hostile guest: templates and drawings make all text printable and escape it, each in one
place, and the page forbids its reader's browser scripts and requests.
"""

from __future__ import annotations

from typing import Final

BEGINNING: Final = "<!DOCTYPE html>\n<!-- chainmerge -->\n"
"""What each page begins with."""
