# SPDX-License-Identifier: Apache-2.0
"""Why the chains of a directory cannot be listed."""

from __future__ import annotations

from typing import ClassVar

from chainmerge.errors import ImageUnavailable, Refused


class DirectoryUnreadable(ImageUnavailable, Refused):
    """A directory whose chains were to be listed cannot be read."""

    code: ClassVar[str] = "directory-unreadable"
    template: ClassVar[str] = "cannot list the images in {directory}: {reason}"
    hint: ClassVar[str] = "check the path and its permissions"
    explanation: ClassVar[str] = (
        "To list chains, the headers of all files in a directory are read. This directory does not "
        "exist, is not one, or may not be read by this user. Nothing was changed."
    )
    directory: str
    reason: str


class DirectoryTooLarge(Refused):
    """A directory has more entries than are looked at."""

    code: ClassVar[str] = "directory-too-large"
    template: ClassVar[str] = "{directory} has more than {limit} entries, which are not looked at"
    hint: ClassVar[str] = "look at one chain: chainmerge info IMAGE"
    explanation: ClassVar[str] = (
        "To list chains, the headers of all files in a directory are read, up to a limit. A list "
        "that stopped there could take an image for the end of its chain while another one stands "
        "on it, so none is made. Nothing was changed."
    )
    directory: str
    limit: int
