# SPDX-License-Identifier: Apache-2.0
"""Why chains cannot be listed, and places not scanned."""

from __future__ import annotations

from typing import ClassVar

from chainmerge.errors import Failed, ImageUnavailable, Refused


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


class PlaceUnreadable(ImageUnavailable, Refused):
    """A place that was to be scanned is not there, or cannot be listed."""

    code: ClassVar[str] = "place-unreadable"
    template: ClassVar[str] = "cannot scan {place}: {reason}"
    hint: ClassVar[str] = "name an image, a directory or a volume group of this host"
    explanation: ClassVar[str] = (
        "A scan looks at images, at directories with everything below them, and at the volumes of "
        "volume groups. This place is none of these, or may not be read by this user. Nothing was "
        "changed."
    )
    place: str
    reason: str


class PlaceTooLarge(Refused):
    """A place that was to be scanned has more in it than is looked at."""

    code: ClassVar[str] = "place-too-large"
    template: ClassVar[str] = "{place} has more than {limit} {what}, which are not looked at"
    hint: ClassVar[str] = "scan a part of it: chainmerge scan DIRECTORY"
    explanation: ClassVar[str] = (
        "A scan that stopped at some limit could take an image for the end of its chain while "
        "another one stands on it, so none is made. Nothing was changed."
    )
    place: str
    what: str
    limit: int


class TablesNotWritten(Failed):
    """The tables of a scan could not be written."""

    code: ClassVar[str] = "tables-not-written"
    template: ClassVar[str] = "{file} was not written: {reason}"
    hint: ClassVar[str] = "name a file in a directory that this user may write to, with free space"
    explanation: ClassVar[str] = (
        "A scan can be written as tables of SQLite. They are written beside their place and "
        "renamed, so what was there before is as it was. No image was changed."
    )
    file: str
    reason: str
