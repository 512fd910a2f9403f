# SPDX-License-Identifier: Apache-2.0
"""The consistency check of one image, for who asks for it."""

from __future__ import annotations

from pathlib import Path

from chainmerge.chain import discover
from chainmerge.inspection import open_chain, policy_of
from chainmerge.options import Access
from chainmerge.qcow2.check import check
from chainmerge.types import REPORT_VERSION, CheckResult


def check_image(image: str | Path, access: Access | None = None) -> CheckResult:
    """Recompute an image's refcounts and compare them with the stored ones; writes nothing.

    Raises:
        Refused: the image cannot be read, or has no refcounts.
    """
    access = access or Access()
    chain = discover(Path(image), policy_of(access))
    with open_chain(chain) as opened:
        top = opened.images[-1]
        if top.image is None:
            return CheckResult(REPORT_VERSION, str(image), 0, 0, (), top.info.file_size)
        report = check(top.image)
    return CheckResult(
        version=REPORT_VERSION,
        image=str(image),
        corruptions=report.corruptions + report.overlaps,
        leaks=report.leaks,
        messages=report.messages,
        image_end_offset=report.image_end_offset,
    )
