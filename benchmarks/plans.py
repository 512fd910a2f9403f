# SPDX-License-Identifier: Apache-2.0
"""Planning on metadata of a size that nobody wants to read twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.harness import CHAINMERGE, Comparison, Contender, compare, nothing_to_prepare
from tests.support.qemu import create, qemu_img

if TYPE_CHECKING:
    from pathlib import Path

_TIB = 1 << 40


def plan_of_preallocated_metadata(scratch: Path, rounds: int) -> Comparison:
    """`chainmerge plan` against `qemu-img measure`: top has 1 TiB of preallocated metadata."""
    base = create(scratch / "base.qcow2", _TIB)
    top = create(scratch / "top.qcow2", _TIB, preallocation="metadata")
    # qemu-img does not preallocate over a backing file.
    qemu_img("rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", base, top)
    ours = Contender(
        "chainmerge plan",
        ((*CHAINMERGE, "plan", str(top)),),
        nothing_to_prepare,
        # The plan says that the file system lacks a TiB; it took all the work to find out.
        statuses=(0, 3),
    )
    theirs = Contender(
        "qemu-img measure",
        (("qemu-img", "measure", "-f", "qcow2", "-O", "qcow2", str(top)),),
        nothing_to_prepare,
    )
    return compare("plan, 1 TiB of preallocated metadata", ours, theirs, rounds)
