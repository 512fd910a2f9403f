# SPDX-License-Identifier: Apache-2.0
"""Pictures of reports for the documentation: ``python -m tests.browser.screenshots DIRECTORY``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.browser.drawn_chain import build_chain
from tests.support.browser import running_browser
from tests.support.cli import chainmerge

WIDTH: Final = 820
PICTURES: Final = (("report.png", False), ("report-dark.png", True))
"""Their names, and whether they are dark."""


def main(directory: Path) -> None:
    """Write all pictures into *directory*."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, running_browser() as browser:
        place = Path(scratch) / "images"
        place.mkdir()
        images = build_chain(place)
        page = Path(scratch) / "plan.html"
        ran = chainmerge(
            *("plan", "--delete", "--sole-user", "--base", images[1], images[3], "--report", page)
        )
        assert ran.status == 0, ran
        # Where it was made is of no interest.
        page.write_text(page.read_text().replace(str(place), "/images"))
        for name, dark in PICTURES:
            browser.open(page, WIDTH, dark=dark)
            browser.screenshot(directory / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
