# SPDX-License-Identifier: Apache-2.0
"""What holds when a merge by the native engine fails.

::

    Failed           MergeNotWritten   before the switch: base is the old image
    OutcomeUnknown   SwitchUnknown     at the switch (:mod:`chainmerge.engines.metadata.errors`)
    Failed           ReleaseFailed     after the switch (there, too)
"""

from __future__ import annotations

from typing import ClassVar

from chainmerge.errors import ChainmergeError, Failed


def cause_of(error: OSError | ChainmergeError, written: str) -> str:
    """What went wrong, without the name of the image that is *written*, but with any other's."""
    if getattr(error, "image", None) == written:
        return str(getattr(error, "reason", error))
    return str(error)


class MergeNotWritten(Failed):
    """Something could not be written before the switch."""

    code: ClassVar[str] = "merge-not-written"
    template: ClassVar[str] = (
        "{image}: the merge failed before it took effect ({step}): {reason}; every image above "
        "is untouched and still gives the right content"
    )
    hint: ClassVar[str] = (
        "fix the cause (the kernel log, 'dmesg', shows I/O errors; damaged data must come from a "
        "backup), then run the same command again"
    )
    explanation: ClassVar[str] = (
        "Everything new is written to clusters that base does not use, and base's first sector is "
        "switched to it at the end. That did not happen, so base's tables and bitmaps are the old "
        "ones. If data was to be written in place, base may hold some of the new data in clusters "
        "that the images above hide: then base alone is not a restore point. A few clusters may be "
        "marked as used although nothing uses them; the same command, or 'chainmerge repair', "
        "gives them back."
    )
    image: str
    step: str
    reason: str
