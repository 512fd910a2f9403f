# SPDX-License-Identifier: Apache-2.0
"""The file that a report is written to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from chainmerge.cli.errors import NotAReport, ReportFileUnusable
from chainmerge.errors import ChainmergeError
from chainmerge.report.html import BEGINNING
from chainmerge.storage.errors import ImageMissing
from chainmerge.storage.files import FileReadable, write_file_durably

_MODE: Final = 0o644


def write_report_file(file: str, page: str) -> None:
    """Write a page as a whole; an older report of that name is replaced.

    Raises what :func:`write_whole_file` raises.
    """
    write_whole_file(file, page.encode(), BEGINNING)


def write_whole_file(file: str, data: bytes, beginning: str) -> None:
    """Write a file as a whole; one that begins alike, or is empty, is replaced.

    Raises:
        NotAReport: there is something else.
        ReportFileUnusable: it cannot be written there.
    """
    target = Path(os.path.realpath(file))
    if not _may_be_replaced(target, beginning.encode()):
        raise NotAReport(file)
    try:
        write_file_durably(target, data, _MODE)
    except ChainmergeError as error:
        raise ReportFileUnusable(file, error.sentence) from error


def _may_be_replaced(target: Path, expected: bytes) -> bool:
    try:
        with FileReadable(target) as readable:
            if readable.is_block_device:
                return False
            beginning = readable.read(0, min(readable.size, len(expected)))
    except ImageMissing:
        return True
    except ChainmergeError:
        return False
    return beginning in (b"", expected)
