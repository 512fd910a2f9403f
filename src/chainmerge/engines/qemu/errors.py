# SPDX-License-Identifier: Apache-2.0
"""What can go wrong while QEMU copies guest data.

::

    DaemonMissing    Refused   there is no qemu-storage-daemon; nothing was started
    DaemonFailed     Failed    it did not start, or ended in a way that it should not
    CommandRefused   Failed    it answered a command with an error and still runs
    ConnectionLost   Failed    it went away in the middle of something
    CommitFailed     Failed    the merge of one base did not come to its end, for any of these
    ImageNotOpened   Refused   it cannot read an image, such as for lack of the right key
"""

from __future__ import annotations

from typing import ClassVar

from chainmerge.errors import Failed, Refused

_STATE = (
    "The images above base were open read-only and still give the right content. Base may hold "
    "part of the copied data, which the images above hide. Its bitmaps were set aside before the "
    "copy began, so the same command finishes the job."
)


class DaemonMissing(Refused):
    """QEMU's storage daemon, which writes the guest data, is not installed."""

    code: ClassVar[str] = "qemu-storage-daemon-missing"
    template: ClassVar[str] = "{program} is not on the search path"
    hint: ClassVar[str] = (
        "install it: package qemu-system-common on Debian 12, qemu-utils on Debian 13, "
        "qemu-img on Fedora and its relatives"
    )
    explanation: ClassVar[str] = (
        "Guest data is copied by qemu-storage-daemon, a program of QEMU without a virtual "
        "machine. Version 7.2 or newer is needed. Nothing was changed."
    )
    program: str


class DaemonFailed(Failed):
    """The storage daemon did not start, or did not end properly."""

    code: ClassVar[str] = "qemu-storage-daemon-failed"
    template: ClassVar[str] = "qemu-storage-daemon {reason}"
    hint: ClassVar[str] = (
        "read its message; if `qemu-storage-daemon --version` works, run the same command again"
    )
    explanation: ClassVar[str] = (
        "The program that copies guest data did not start, ended by itself, or did not end "
        "when told to. " + _STATE
    )
    reason: str


class CommandRefused(Failed):
    """The storage daemon answered a command with an error."""

    code: ClassVar[str] = "qemu-command-refused"
    template: ClassVar[str] = "qemu-storage-daemon refused {command}: {reason}"
    hint: ClassVar[str] = "fix the cause that QEMU names, then run the same command again"
    explanation: ClassVar[str] = (
        "QEMU was asked to open an image or to start a job, and declined with the reason shown. "
        "A command that was refused has changed nothing by itself. " + _STATE
    )
    command: str
    reason: str


class ConnectionLost(Failed):
    """The storage daemon went away."""

    code: ClassVar[str] = "qemu-connection-lost"
    template: ClassVar[str] = "qemu-storage-daemon went away: {reason}"
    hint: ClassVar[str] = (
        "find out what ended it (the kernel log, 'dmesg', shows killed processes), then run the "
        "same command again"
    )
    explanation: ClassVar[str] = (
        "The program that copies guest data was killed or crashed. It also holds the image locks, "
        "so they are free only now that it is gone. " + _STATE
    )
    reason: str


class CommitFailed(Failed):
    """Guest data did not arrive in base, or base was not closed properly."""

    code: ClassVar[str] = "commit-failed"
    template: ClassVar[str] = (
        "copying {top} down into {base} failed: {reason}; {top} is untouched and still gives the "
        "right content"
    )
    hint: ClassVar[str] = "fix the cause that QEMU names, then run the same command again"
    explanation: ClassVar[str] = (
        "QEMU reported an error while it copied guest data into base, or while it closed base "
        "(it exits with status 0 even then, so its messages are what counts). " + _STATE
    )
    base: str
    top: str
    reason: str


class ImageNotOpened(Refused):
    """QEMU cannot read the images of a chain."""

    code: ClassVar[str] = "qemu-cannot-read"
    template: ClassVar[str] = "QEMU cannot read {image} or an image below it: {reason}"
    hint: ClassVar[str] = (
        "if a passphrase is wrong: each encrypted image has its own, see --key-file; the file must "
        "hold exactly the passphrase, without a newline at its end"
    )
    explanation: ClassVar[str] = (
        "The content of encrypted images is read by QEMU, which is given the files with the "
        "passphrases. It could not open an image, or could not read it to its end. Nothing was "
        "changed."
    )
    image: str
    reason: str
