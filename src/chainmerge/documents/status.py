# SPDX-License-Identifier: Apache-2.0
"""Merges that were not finished."""

from __future__ import annotations

from msgspec import Struct


class MergeProcess(Struct, frozen=True):
    """The process that does a merge, or did.

    Attributes:
        pid: Its number.
        host: The name of the machine that it runs on, or ran.
        command: What it was started with, for a shell.
        running: Whether it is doing the merge now; false also if it is on another machine.
    """

    pid: int
    host: str
    command: str
    running: bool


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
        vm_may_start: Whether the VM may be started now, from ``vm_image`` or from an image on it.
            False also if that is not known.
        vm_image: The image that shows what the guest wrote last; None if that is not known, and
            else no data is lost.
        vm_reason: Why the VM may start or not, in a sentence.
        cancel_command: What undoes the merge, for a shell; None if it cannot be undone.
        cancel_reason: Why it cannot be undone, in a sentence; empty if it can.
        bytes_done: Bytes that were copied when that was written down last, None if it was not.
        bytes_total: Bytes that are to be copied, None as above.
        rate: Bytes per second that the copy has come to until then, None as above.
        noted_at: When one of its files was written last, in seconds since 1970 (UTC).
        process: Who does it, or did; None if no file says.
        leaf: The uppermost image of the chain whose snapshots are thinned out, where the merge is
            one of those that this takes.
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
    vm_may_start: bool = False
    vm_image: str | None = None
    vm_reason: str = ""
    cancel_command: str | None = None
    cancel_reason: str = ""
    bytes_done: int | None = None
    bytes_total: int | None = None
    rate: int | None = None
    noted_at: int | None = None
    process: MergeProcess | None = None
    leaf: str | None = None

    @property
    def is_one_of_several(self) -> bool:
        """Whether it is done together with other merges, by one command."""
        return bool(self.disks) or self.leaf is not None


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
        direction: Which way it goes: ``pull`` merges base, and what is between, into top.
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
    direction: str = "commit"


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
