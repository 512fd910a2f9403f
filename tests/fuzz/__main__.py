# SPDX-License-Identifier: Apache-2.0
"""``make fuzz``: cases, one after the other, for a time; what they find is printed."""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.case import Stable, findings_of
from tests.fuzz.corpus import memory


def main() -> int:
    """Run cases; the exit status is 1 where one of them found something."""
    options = _options()
    found = 0
    with tempfile.TemporaryDirectory(prefix="chainmerge-fuzz-", dir=memory()) as scratch:
        stable = Stable(Path(scratch))
        if options.case:
            for seed in options.case:
                for finding in findings_of(seed, stable):
                    found += 1
                    print(finding, flush=True)
            return 1 if found else 0
        deadline = time.monotonic() + 60 * options.minutes
        number = 0
        while time.monotonic() < deadline:
            for finding in findings_of(f"{options.seed}-{number}", stable):
                found += 1
                print(finding, flush=True)
            number += 1
            if number % 1000 == 0:
                print(_balance(number, found), file=sys.stderr, flush=True)
        print(_balance(number, found))
    return 1 if found else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make fuzz")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", action="append", help="run this case again, and no other")
    return parser.parse_args()


def _balance(cases: int, found: int) -> str:
    seconds = sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
    return f"{cases} cases, {seconds / 3600:.2f} hours of CPU, {found} findings"


if __name__ == "__main__":
    sys.exit(main())
