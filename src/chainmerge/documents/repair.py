# SPDX-License-Identifier: Apache-2.0
"""What ``repair`` found, did and undid."""

from __future__ import annotations

from msgspec import Struct

UNUSABLE_BITMAP = "unusable-bitmap"
KEPT_LEAKS = "kept-leaks"
NO_DAMAGE = frozenset({UNUSABLE_BITMAP, KEPT_LEAKS})
"""The kind of a finding that is not damage: a bitmap that no chain can use."""


class RepairFinding(Struct, frozen=True):
    """Something wrong with an image.

    Attributes:
        kind: ``broken-bitmap``, ``broken-bitmap-directory``, ``unusable-bitmap``,
            ``leaked-clusters``, ``kept-leaks``, ``wrong-refcounts``, ``dirty-bit``,
            ``corrupt-bit``, ``interrupted-merge``, ``half-done-commit``, ``corruption``,
            ``lost-data``, or the code of the error that keeps the image from being used or
            repaired.
        sentence: What is wrong.
        repairable: Whether ``repair`` does something about it.
    """

    kind: str
    sentence: str
    repairable: bool


class RepairReport(Struct, frozen=True):
    """What ``repair`` found and did.

    Attributes:
        version: Version of this document.
        image: The image's path.
        dry_run: Whether nothing was written.
        findings: What was wrong.
        actions: What was done about it (with ``dry_run``: what would be), a sentence each.
        consequences: What it means for backups, a sentence each.
        backup: The file that ``repair --undo`` takes to put back what was overwritten, None if
            nothing was. Merges that were finished cannot be undone.
        verified: What was checked afterwards, a sentence each.
        warnings: What the user should know, a sentence each.
    """

    version: int
    image: str
    dry_run: bool
    findings: tuple[RepairFinding, ...]
    actions: tuple[str, ...]
    consequences: tuple[str, ...]
    backup: str | None = None
    verified: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def leaves_damage(self) -> bool:
        """Whether something is wrong that is not repaired here."""
        return any(
            not finding.repairable and finding.kind not in NO_DAMAGE for finding in self.findings
        )


class UndoReport(Struct, frozen=True):
    """What ``repair --undo`` put back.

    Attributes:
        version: Version of this document.
        image: The image's path.
        backup: The file that held what was overwritten.
        restored_bytes: How many bytes were put back.
    """

    version: int
    image: str
    backup: str
    restored_bytes: int


class CancelReport(Struct, frozen=True):
    """What ``cancel`` did.

    Attributes:
        version: Version of this document.
        base: The image that was to be merged into.
        top: The uppermost image that was to be merged, None if no file named it.
        image: The one of them that the merge had written to.
        freed_bytes: Bytes of clusters of ``image`` that the merge had taken, and that are free now.
        removed: The files of the merge that were removed, in words.
        remains: What the merge had changed and cannot be undone, a sentence each.
        verified: What was checked afterwards, a sentence each.
        warnings: What the user should know, a sentence each.
    """

    version: int
    base: str
    top: str | None
    image: str
    freed_bytes: int
    removed: tuple[str, ...]
    remains: tuple[str, ...] = ()
    verified: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class VmLeftover(Struct, frozen=True):
    """Something in a running VM that a backup or another job has made.

    Attributes:
        kind: ``job``, ``export`` or ``bitmap``.
        name: Its id or name; empty for a bitmap without one.
        node: The node that it is on, None for a job.
        image: The file of that node, None if that is none, or nobody knows.
        state: How it is, in a few words.
        action: What ``live repair`` does: ``dismiss``, ``cancel`` or ``remove``; None if it stays.
        done: Whether that was done. False also with ``dry_run``.
        reason: Why it goes, or stays, in a sentence.
        advice: What to do about it if it stays; empty if nothing is to be done.
    """

    kind: str
    name: str
    node: str | None
    image: str | None
    state: str
    action: str | None
    reason: str
    advice: str = ""
    done: bool = False


class VmRepairReport(Struct, frozen=True):
    """What ``live repair`` found and did.

    Attributes:
        version: Version of this document.
        vm: The VM, as messages call it.
        dry_run: Whether nothing was changed.
        leftovers: What was found: jobs, then exports, then bitmaps. Checkpoints are not listed.
    """

    version: int
    vm: str
    dry_run: bool
    leftovers: tuple[VmLeftover, ...]

    @property
    def has_failed(self) -> bool:
        """Whether something is still there that should have gone."""
        return not self.dry_run and any(
            one.action is not None and not one.done for one in self.leftovers
        )
