# SPDX-License-Identifier: Apache-2.0
"""A real worker whose children do nothing: what is left is the cost of the fleet itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from chainmerge.cli.fleet.configuration import host_option
from chainmerge.fleet import child
from chainmerge.fleet.worker import work

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainmerge.fleet.settings import HostSettings

# As where an earlier run was interrupted: there is no plan to compare.
_NO_PLAN: Final = json.dumps({"event": "error", "code": "thinning-unfinished"})
_REPORT: Final = json.dumps({"event": "report", "version": 1, "outcome": "merged"})


def _echo(words: Sequence[str], module: str = "chainmerge") -> list[str]:
    del module
    return ["echo", _NO_PLAN if "--dry-run" in words else _REPORT]


@host_option
def main(*, host: HostSettings) -> None:
    """Work until told to end."""
    work(host, once=False)


if __name__ == "__main__":
    child._command = _echo
    main(config=str(Path(sys.argv[1])))
