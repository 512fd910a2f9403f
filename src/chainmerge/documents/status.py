# SPDX-License-Identifier: Apache-2.0
"""Merges that were not finished."""

from __future__ import annotations

from msgspec import Struct


class UnfinishedMerge(Struct, frozen=True):
    """A merge that was not finished, as far as the files that it left say.

    Attributes:
        base: The image merged into.
        top: The uppermost image that is merged, None if no file names it.
        state: The journal's last entry (``prepared``, ``switching``, ``switched``, ``repoint``,
            ``record``, ``rename``, ``delete``, ``tidy``, ``give-back``; of a live merge
            ``preparing``, ``copying``, ``switching``, ``settling``, ``undoing``), ``unknown`` where
            there is no journal that can be used.
        progress: How far it got, in a sentence.
        base_holds_data: Whether base holds the data of all merged images already, None if only
            a look at all of it could tell.
        base_is_locked: Whether somebody has base open now: perhaps this merge still runs.
        command: What finishes it, for a shell; None if no file says what was requested. Of a
            live merge it is what continues it in the VM if somebody has base open, otherwise what
            finishes it without the VM; the other one is in ``warnings``.
        files: The files that tell of it.
        warnings: What the user should know, a sentence each.
        disks: The tops of all disks that are merged together, where it is one of several.
    """

    base: str
    top: str | None
    state: str
    progress: str
    base_holds_data: bool | None
    base_is_locked: bool
    command: str | None
    files: tuple[str, ...]
    warnings: tuple[str, ...]
    disks: tuple[str, ...] = ()


class StatusReport(Struct, frozen=True):
    """Merges that were not finished.

    Attributes:
        version: Version of this document.
        searched: The directories that were looked at. Those that were named were searched with
        everything below, links left out.
        merges: What was found, in the order of base's path.
        not_searched: What below them was not searched, and why, a sentence each.
    """

    version: int
    searched: tuple[str, ...]
    merges: tuple[UnfinishedMerge, ...]
    not_searched: tuple[str, ...] = ()


class LiveMergeStatus(Struct, frozen=True):
    """A live merge that was not finished.

    Attributes:
        base: The image merged into.
        top: The uppermost image that is merged.
        active: Whether top is, or was, what the guest writes to.
        state: The journal's last entry (``preparing``, ``copying``, ``switching``, ``settling``,
            ``undoing``).
        job: Where the VM's job is (``running``, ``paused``, ``ready``, ``held``, ``ending``,
            ``done``), None if there is none.
        bytes_done: Guest bytes that the job has copied.
        bytes_total: Guest bytes that it is to copy, as far as it is known.
        merged: Whether the VM's chain lacks the merged images already.
        guest_waits: Whether the guest's requests wait for the merge to continue.
        error: Why the job failed, None if it did not.
        command: What continues the merge, for a shell.
    """

    base: str
    top: str
    active: bool
    state: str
    job: str | None
    bytes_done: int
    bytes_total: int
    merged: bool
    guest_waits: bool
    error: str | None
    command: str


class LiveStatusReport(Struct, frozen=True):
    """Live merges of one disk that were not finished.

    Attributes:
        version: Version of this document.
        vm: The VM, as messages call it.
        chain: The images of the disk, the active one first.
        merges: What was found.
    """

    version: int
    vm: str
    chain: tuple[str, ...]
    merges: tuple[LiveMergeStatus, ...]
