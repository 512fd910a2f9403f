# SPDX-License-Identifier: Apache-2.0
"""The consistency check of one image, on request."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from chainmerge.bitmaps.rules import BitmapState
from chainmerge.bitmaps.stored import state_of
from chainmerge.chain.discovery import discover
from chainmerge.chain.opening import open_chain
from chainmerge.chain.target import policy_of
from chainmerge.documents.images import CheckResult
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.options import Access
from chainmerge.qcow2.check import check
from chainmerge.records.unfinished import status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.chain.model import ImageInfo
    from chainmerge.chain.opening import OpenImage
    from chainmerge.qcow2.image import Qcow2Image


def check_image(image: str | Path, access: Access | None = None) -> CheckResult:
    """Recompute an image's refcounts and compare them with the stored ones; writes nothing.

    Raises:
        Refused: the image cannot be read, or has no refcounts.
    """
    access = access or Access()
    chain = discover(Path(image), policy_of(access))
    with open_chain(chain) as opened:
        top = opened.images[-1]
        end = top.info.file_size
        if top.image is None:
            remarks = tuple(_unfinished(top.info, end))
            return CheckResult(REPORT_VERSION, str(image), 0, 0, (), end, remarks)
        report = check(top.image)
        remarks = (
            *_marks(top.image),
            *_unusable_bitmaps(top),
            *_unfinished(top.info, report.image_end_offset),
        )
    return CheckResult(
        version=REPORT_VERSION,
        image=str(image),
        corruptions=report.corruptions + report.overlaps,
        leaks=report.leaks,
        messages=report.messages,
        image_end_offset=report.image_end_offset,
        remarks=remarks,
    )


def _marks(image: Qcow2Image) -> Iterator[str]:
    if image.header.dirty:
        yield (
            "it was not closed properly (dirty bit): `chainmerge repair IMAGE` shows what is stale"
        )
    if image.header.corrupt:
        yield "QEMU has marked it corrupt, and does not open it for writing"


def _unusable_bitmaps(top: OpenImage) -> Iterator[str]:
    assert top.image is not None
    for entry in top.info.bitmaps:
        if state_of(top.image, entry) is BitmapState.IN_USE:
            yield (
                f"bitmap {entry.name!r} is inconsistent (in-use): a program is writing to the "
                "image, or died while it was. If no VM is running, `chainmerge bitmaps repair "
                "LEAF` drops it from the whole chain, and the next backup must be a full one"
            )


def _unfinished(info: ImageInfo, end: int) -> Iterator[str]:
    for merge in status([info.path]).merges:
        what = f"a merge of {merge.top or 'an image'} into {merge.base}"
        if merge.base_is_locked:
            yield f"{what} may be going on: {merge.progress}"
            continue
        sentence = f"{what} is unfinished: {merge.progress}"
        if merge.base == str(info.real_path) and info.file_size > end:
            sentence += f"; {info.file_size - end} bytes behind the image's end are still reserved"
        yield f"{sentence} (`chainmerge status` shows what finishes it)"
