# SPDX-License-Identifier: Apache-2.0
"""Runs the demo and prints its table; the exit status is 0 if chainmerge was always right."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from demo.outcome import Outcome, look_at
from demo.scenario import DATA_SIZE, DISK_SIZE, GOOD, MIB, VOLUME_SIZE, Workshop
from demo.volumes import FixedVolume, fixed_volume
from demo.ways import Attempt, merge_with_chainmerge, merge_with_qemu_img

WAYS: Final = (("qemu-img", merge_with_qemu_img), ("chainmerge", merge_with_chainmerge))
STALE_COUNTS: Final = (0, 5, 6, 10, 11, 13, 14, 32)
_INTRODUCTION = """
A disk of {disk} MiB on a {kind} of {volume} MiB. The image to be merged, top,
holds {data} MiB of data and the bitmap "{good}", which the next incremental backup
needs. Base holds stale bitmaps that no backup needs. How often does a merge go right?

  qemu-img     qemu-img commit; qemu-img bitmap --add; qemu-img bitmap --merge
  chainmerge   chainmerge merge top.qcow2
"""
_LEGEND = """
chainmerge's time includes reading everything back to verify it.
"!" behind an exit status: the command wrote to standard error that bitmaps are lost,
and still exited 0 as a success. "in-use" is what QEMU calls a bitmap that is lost.
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument(
        "stale", nargs="*", type=int, default=STALE_COUNTS, help="numbers of stale bitmaps"
    )
    counts: tuple[int, ...] = tuple(parser.parse_args().stale)

    console = Console(highlight=False)
    table = _empty_table()
    failures: list[Attempt] = []
    with (
        tempfile.TemporaryDirectory(prefix="chainmerge-demo-") as scratch,
        fixed_volume(Path(scratch), VOLUME_SIZE) as volume,
        console.status("building images") as status,
    ):
        console.print(_introduction(volume), soft_wrap=True)
        workshop = Workshop(Path(scratch))
        for stale in counts:
            status.update(f"{stale} stale bitmaps")
            for way, merge in WAYS:
                case = workshop.case(volume, stale)
                attempt = merge(case)
                outcome = look_at(case, workshop)
                table.add_row(str(stale), way, *_cells(attempt, outcome))
                if merge is merge_with_chainmerge and not (attempt.succeeded and outcome.right):
                    failures.append(attempt)
            table.add_section()
    console.print(table)
    console.print(_LEGEND, soft_wrap=True)
    for failure in failures:
        console.print(failure.steps[-1].stderr, markup=False, style="red", soft_wrap=True)
    return 1 if failures else 0


def _introduction(volume: FixedVolume) -> str:
    return _INTRODUCTION.format(
        disk=DISK_SIZE // MIB,
        kind=volume.kind,
        volume=VOLUME_SIZE // MIB,
        data=DATA_SIZE // MIB,
        good=GOOD,
    )


def _empty_table() -> Table:
    table = Table(header_style="bold")
    table.add_column("stale", justify="right")
    for column in ("way", "exit", "data", f"{GOOD} bitmap", "stale bitmaps"):
        table.add_column(column, no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    return table


def _cells(attempt: Attempt, outcome: Outcome) -> tuple[Text, ...]:
    statuses = " ".join(
        f"{step.status}{'!' if step.status == 0 and 'Lost' in step.stderr else ''}"
        for step in attempt.steps
    )
    others = ", ".join(f"{count} {state}" for state, count in sorted(outcome.others.items()))
    unharmed = "in-use" not in outcome.others
    return (
        Text(statuses, style="green" if attempt.succeeded else "red"),
        _verdict("right" if outcome.content_right else "WRONG", fine=outcome.content_right),
        _verdict(outcome.good, fine=outcome.good == "valid"),
        _verdict(others or "none", fine=unharmed),
        Text(f"{attempt.seconds:.2f} s"),
    )


def _verdict(text: str, *, fine: bool) -> Text:
    return Text(text, style="green" if fine else "bold red")


if __name__ == "__main__":
    sys.exit(main())
