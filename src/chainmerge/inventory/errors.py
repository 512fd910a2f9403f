# SPDX-License-Identifier: Apache-2.0
"""Why chains cannot be listed, and places not scanned."""

from __future__ import annotations

from typing import ClassVar

from chainmerge.errors import Failed, ImageUnavailable, Misuse, Refused


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


class NotLeaf(Misuse):
    """Snapshots were to be thinned out below an image that is not the leaf of its chain."""

    code: ClassVar[str] = "not-leaf"
    template: ClassVar[str] = "{image} is not the leaf of its chain: {child} stands on it"
    hint: ClassVar[str] = "name the image that the guest writes to: chainmerge info {child}"
    explanation: ClassVar[str] = (
        "Which snapshots are the last ones is counted from the leaf down, and the leaf is the one "
        "image that always stays. Of an image that others stand on, both would be wrong. Nothing "
        "was changed."
    )
    image: str
    child: str


class NoSnapshotMatches(Misuse):
    """Patterns alone were to say which snapshots stay, and none of them matches one."""

    code: ClassVar[str] = "no-snapshot-matches"
    template: ClassVar[str] = "no snapshot below {leaf} has a name like {patterns}"
    hint: ClassVar[str] = (
        "the names are in: chainmerge info {leaf}; if none of them shall stay, say --keep-last 0"
    )
    explanation: ClassVar[str] = (
        "Patterns were the only rule, and what no rule keeps is merged away: a pattern with a slip "
        "of the pen would cost every snapshot of the chain. Nothing was changed."
    )
    leaf: str
    patterns: str


class ActiveIsNotLeaf(Misuse):
    """Another image was named as the upper end of a chain than as its leaf."""

    code: ClassVar[str] = "active-is-not-leaf"
    template: ClassVar[str] = "--active names {active}, which is another image than {leaf}"
    hint: ClassVar[str] = "leave out --active: the leaf of a chain is its active layer"
    explanation: ClassVar[str] = (
        "Snapshots are thinned out below the leaf of a chain, which is what the guest writes to. "
        "There is no other image above it. Nothing was changed."
    )
    leaf: str
    active: str


class ThinningUnfinished(Refused):
    """An earlier run that thins out the same chain was interrupted."""

    code: ClassVar[str] = "thin-out-unfinished"
    template: ClassVar[str] = "an interrupted run has not finished thinning out {leaf}"
    hint: ClassVar[str] = "finish it: {command}; or undo what can be undone: chainmerge cancel"
    explanation: ClassVar[str] = (
        "What an interrupted run has decided on is finished by the command that began it, with the "
        "same rules. Only after that is the chain one on which other rules can decide. Nothing was "
        "changed."
    )
    leaf: str
    command: str


class ThinningOutdated(Refused):
    """The chain is another one than that of which an interrupted run has decided."""

    code: ClassVar[str] = "thin-out-outdated"
    template: ClassVar[str] = (
        "an interrupted run was to merge {base} up to {top}, and these are other images by now"
    )
    hint: ClassVar[str] = (
        "look at the chain: chainmerge info {leaf}; to have everything decided anew: "
        "chainmerge cancel {leaf}, and then thin it out again"
    )
    explanation: ClassVar[str] = (
        "What an interrupted run has decided on holds for the images that there were then. One "
        "that came to stand among them since, under whatever name, may be a snapshot that a rule "
        "keeps. Nothing was changed by this run."
    )
    base: str
    top: str
    leaf: str


class UnfinishedMergeBelow(Refused):
    """Snapshots were to be thinned out of which an interrupted merge may have written to some."""

    code: ClassVar[str] = "thin-out-after-merge"
    template: ClassVar[str] = (
        "a merge into {base} was interrupted, which is an image of the chain of {leaf}"
    )
    hint: ClassVar[str] = "finish or cancel it, as it says: {command}; then run this command again"
    explanation: ClassVar[str] = (
        "While a merge is unfinished its base may be half written. What the image above it hides, "
        "the snapshots that stand on base show, and one that stays would be kept with wrong data. "
        "Nothing was changed."
    )
    base: str
    leaf: str
    command: str
