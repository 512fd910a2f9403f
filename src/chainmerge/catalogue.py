# SPDX-License-Identifier: Apache-2.0
"""All errors of the package and what `repair` finds, to be looked up by code or by words."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
import string
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Final

from msgspec import Struct

from chainmerge.errors import ChainmergeError, ExitCode, Misuse, all_errors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class UnknownCode(Misuse):
    """Asked to explain something that is not an error of ours."""

    code: ClassVar[str] = "unknown-code"
    template: ClassVar[str] = "there is no error with the code {asked!r}"
    hint: ClassVar[str] = "{suggestion}"
    explanation: ClassVar[str] = (
        "`chainmerge explain` knows the codes that chainmerge prints with its errors and puts in "
        "its JSON reports, and what `chainmerge repair` finds. Without a code it lists them all; "
        "given other words, those that have to do with them."
    )
    asked: str
    suggestion: str


def known_errors() -> dict[str, type[ChainmergeError]]:
    """Return all error classes by their codes, in the order of the codes.

    Imports the whole package, for only what is imported can be known.
    """
    for module in pkgutil.walk_packages([str(Path(__file__).parent)], "chainmerge."):
        if not module.name.endswith(".__main__"):
            importlib.import_module(module.name)
    # Who uses the package may have errors of their own that build on ours.
    ours = (error for error in all_errors() if error.__module__.startswith("chainmerge."))
    return {error.code: error for error in sorted(ours, key=attrgetter("code"))}


class Subject(Struct, frozen=True):
    """Something that can be explained.

    Attributes:
        code: What reports call it.
        exit_code: How a command ends that meets it, None for what is found but ends none.
        sentence: What is wrong, with ``<name>`` where a fact goes.
        explanation: What it means.
        advice: What to do.
    """

    code: str
    exit_code: ExitCode | None
    sentence: str
    explanation: str
    advice: str

    @property
    def text(self) -> str:
        """The long form, in paragraphs."""
        kind = (
            "found by check, repair, bitmaps list or scan"
            if self.exit_code is None
            else f"exit status {self.exit_code:d}, {MEANINGS[self.exit_code]}"
        )
        paragraphs = [
            f"{self.code} ({kind})",
            self.sentence,
            self.explanation,
            f"What to do: {self.advice}",
        ]
        return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def known_subjects() -> dict[str, Subject]:
    """Return all errors, then all findings, by their codes. Imports the whole package."""
    errors = {
        code: Subject(
            code,
            error.exit_code,
            with_placeholders(error.template),
            error.explanation,
            with_placeholders(error.hint),
        )
        for code, error in known_errors().items()
    }
    return errors | dict(FINDINGS)


def explain(code: str) -> str:
    """Return the long form of an error or a finding: what it means and what to do, in paragraphs.

    Capitals do not count.

    Raises:
        UnknownCode: Nothing has this code.
    """
    subjects = known_subjects()
    wanted = _as_code(code)
    if wanted not in subjects:
        raise _unknown(code, subjects)
    return subjects[wanted].text


def look_up(words: Sequence[str]) -> tuple[Subject, ...]:
    """Return the subject that has the words as its code, or all that have to do with them.

    What they have most to do with comes first.

    Raises:
        UnknownCode: Nothing has.
    """
    subjects = known_subjects()
    asked = " ".join(words)
    exact = subjects.get(_as_code(asked))
    if exact is not None:
        return (exact,)
    terms = [_alternatives(term) for term in _WORD.findall(asked.lower()) if term not in _FILLERS]
    scored = [(_relevance(subject, terms), subject) for subject in subjects.values()]
    found = sorted((one for one in scored if one[0]), key=lambda one: (-one[0], one[1].code))
    if not found:
        raise _unknown(asked, subjects)
    return tuple(subject for _, subject in found)


def _alternatives(word: str) -> frozenset[str]:
    """Return the beginnings of words that mean what *word* means."""
    # shares, shared and sharing begin alike.
    stem = re.sub(r"(?<=\w{3})(?:ed|ing|es|s|e)$", "", word)
    return frozenset({stem, *_SYNONYMS.get(stem, ())})


def _relevance(subject: Subject, terms: Sequence[frozenset[str]]) -> int:
    """How much a subject has to do with all of the terms; 0 if not with each of them."""
    places = (
        (4, subject.code),
        (2, subject.sentence),
        (1, f"{subject.explanation} {subject.advice}"),
    )
    counts = [
        sum(weight for weight, text in places if _mentions(text, alternatives))
        for alternatives in terms
    ]
    return sum(counts) if counts and all(counts) else 0


def _mentions(text: str, alternatives: frozenset[str]) -> bool:
    return any(word.startswith(tuple(alternatives)) for word in _WORD.findall(text.lower()))


def _as_code(text: str) -> str:
    return re.sub(r"[\s_]+", "-", text.strip().lower())


def _unknown(asked: str, subjects: Mapping[str, Subject]) -> UnknownCode:
    alike = difflib.get_close_matches(_as_code(asked), subjects, n=3)
    suggestion = (
        f"did you mean {' or '.join(alike)}?" if alike else "`chainmerge explain` lists them"
    )
    return UnknownCode(asked, suggestion)


def with_placeholders(template: str) -> str:
    """Return a template as a person reads it: with ``<name>`` where a fact goes."""
    parts = string.Formatter().parse(template)
    return "".join(text if field is None else f"{text}<{field}>" for text, field, _, _ in parts)


MEANINGS: Final[Mapping[ExitCode, str]] = MappingProxyType(
    {
        ExitCode.FAILED: "something was attempted and did not work",
        ExitCode.USAGE: "the request makes no sense",
        ExitCode.REFUSED: "refused, nothing was changed",
        ExitCode.UNKNOWN: "the outcome is unknown",
        ExitCode.INTERRUPTED: "stopped on request",
    }
)
"""What an exit status says of a command."""

_WORD: Final = re.compile(r"[a-z0-9]+")
_FILLERS: Final = frozenset({"a", "an", "by", "in", "is", "not", "of", "the", "to", "too"})

# What people say for what errors call otherwise; stems, as _alternatives() makes them.
_SYNONYMS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "busy": ("lock",),
        "clon": ("children", "share"),
        "corrupt": ("damaged", "bad"),
        "enospc": ("space", "room"),
        "full": ("space",),
        "inconsistent": ("broken",),
        "libvirt": ("domain",),
        "password": ("passphrase", "key"),
        "shar": ("others", "children"),
        "small": ("space", "room"),
    }
)


def _finding(code: str, sentence: str, explanation: str, advice: str) -> Subject:
    return Subject(code, None, sentence, explanation, advice)


def _by_code(*subjects: Subject) -> Mapping[str, Subject]:
    return MappingProxyType({subject.code: subject for subject in subjects})


_DROP: Final = (
    "`chainmerge bitmaps repair LEAF`, LEAF being the active image, shows it, asks, and drops it "
    "from the whole chain; the next backup must be a full one"
)
_REPAIR: Final = (
    "`chainmerge repair IMAGE` shows what would be done, `chainmerge repair --yes IMAGE` does it"
)
_MERGE: Final = "`chainmerge plan LEAF` shows what a merge needs and gives back"
FINDINGS: Final = _by_code(
    _finding(
        "broken-bitmap",
        "a bitmap cannot be used, though its name can be read",
        "The bitmap is in-use (QEMU calls it inconsistent): a program died while it had the image "
        "open, so writes are missing from it. Or its table is not where a table can be, or shares "
        "clusters with something else. What it recorded is lost, and a backup that went by it "
        "would miss data. The disk's own data is not affected.",
        _DROP,
    ),
    _finding(
        "broken-bitmap-directory",
        "the list of the image's bitmaps cannot be read",
        "The directory of bitmaps is not where it can be, is damaged, or was overwritten, so "
        "nobody can tell which bitmaps there were. QEMU may refuse to open the image at all. The "
        "disk's own data is not affected.",
        f"{_REPAIR}; it removes all bitmaps, and the next backup must be a full one",
    ),
    _finding(
        "unusable-bitmap",
        "a bitmap is whole, but no chain can use it",
        "A backup needs a bitmap of the same name in every image from the checkpoint up to the "
        "active layer. This one has a gap above it, or is above one that is broken. It does no "
        "harm, but takes space and may pass for a checkpoint.",
        _DROP,
    ),
    _finding(
        "in-use",
        "a bitmap was not stored properly when its image was closed",
        "QEMU marks a bitmap as in-use while it records writes, and takes the mark away when it "
        "closes the image. If the mark is still there, a program has died, and writes are missing. "
        "QEMU itself calls such a bitmap inconsistent, and does not use it. The same mark is "
        "normal while a VM is running.",
        f"if no VM is running: {_DROP}",
    ),
    _finding(
        "leaked-clusters",
        "clusters are marked as used, and nothing uses them",
        "They only take space. A program was killed between allocating them and using them, or "
        "between ceasing to use them and giving them back.",
        _REPAIR,
    ),
    _finding(
        "kept-leaks",
        "leaked clusters may hold the data that a lost table mapped, and stay",
        "An entry of the L1 table leads to no L2 table, and there are leaked clusters with data. "
        "That may be a coincidence: if it is not, they are the only copy of what the guest has "
        "lost, so a repair keeps them.",
        "restore or examine the image first; `chainmerge repair --yes --reclaim IMAGE` gives the "
        "space back and destroys them",
    ),
    _finding(
        "lost-data",
        "data of the guest is lost, or can be reached no longer",
        "Leaked clusters look like what a lost table mapped, or two places of the disk lead to the "
        "same data and no internal snapshot explains it. Which is the right one is not for a "
        "program to guess.",
        "restore the image from a backup; keep this one until you have what you need from it",
    ),
    _finding(
        "wrong-refcounts",
        "reference counts do not agree with what the tables use",
        "Refcounts say which clusters are used, and how often. With wrong ones a writer may "
        "overwrite data that is still needed. They can be counted again from the tables, and the "
        "disk's data is not affected by that.",
        f"do not start the VM before: {_REPAIR}",
    ),
    _finding(
        "dirty-bit",
        "the image was not closed properly (dirty bit)",
        "With lazy refcounts QEMU sets this bit while it writes, and takes it away when it closes "
        "the image. If it is still there, refcounts may be stale.",
        _REPAIR,
    ),
    _finding(
        "corrupt-bit",
        "QEMU has marked the image as corrupt",
        "QEMU sets this bit when it finds that a write would go over a table, and then opens the "
        "image for reading only. If the tables are sound, the mark is all that is left of it.",
        _REPAIR,
    ),
    _finding(
        "interrupted-merge",
        "a merge into this image, or from it, was interrupted",
        "chainmerge notes what it does before it does it, so a merge that was killed can be "
        "finished. No data is lost.",
        "`chainmerge status IMAGE` prints the command that finishes it",
    ),
    _finding(
        "half-done-commit",
        "another program was interrupted while it committed an overlay into this image",
        "A part of the overlay's data is in the image below already, whose bitmaps do not know of "
        "it. The overlay still shows the right data, the image below alone does not.",
        "use the overlay only; `chainmerge repair IMAGE` shows which merge finishes the commit",
    ),
    _finding(
        "corruption",
        "the tables contradict themselves",
        "An entry of a table leads outside the file, or to what belongs to another table. What the "
        "guest had there is lost, and which of two claims on a cluster is right is not for a "
        "program to guess. A repair leaves it alone.",
        "restore the image from a backup; `chainmerge check IMAGE` lists what is wrong",
    ),
    _finding(
        "long-chain",
        "an image stands on a long chain",
        "What a guest reads is looked for in one image after the other, each takes memory of QEMU, "
        "and backups have to follow them all. libvirt before 12.0 does not start a domain whose "
        "chain has 25 images, and no libvirt takes more than 200.",
        _MERGE,
    ),
    _finding(
        "old-overlay",
        "an overlay has been there for long",
        "Its base has not been written for so long, so it is that old: an overlay that was meant "
        "for a day and forgotten grows as long as the guest writes. A base that several overlays "
        "stand on is there to stay, and is not told of.",
        _MERGE,
    ),
    _finding(
        "hidden-bytes",
        "images hold data that images above hide",
        "Nobody can see it any more, and it takes space until the images are merged. The number is "
        "exact as far as data goes; tables and bitmaps of images that a merge deletes come on top.",
        _MERGE,
    ),
    _finding(
        "orphan",
        "an image stands on a chain that has no root",
        "An image below it has lost its backing file, cannot be read, or stands on one above it. "
        "What the guest had there is missing. Overlays alone are worth nothing without it.",
        "find the lost image: `chainmerge relink IMAGE` names files that could be it; otherwise "
        "restore the chain from a backup",
    ),
    _finding(
        "format-not-declared",
        "an image does not declare the format of its backing file",
        "QEMU then finds it out from the first bytes, which a guest may have written. libvirt does "
        "not start a domain with such an image.",
        "`chainmerge relink IMAGE --backing BASE` stores the format with the name",
    ),
    _finding(
        "qcow-read-as-raw",
        "an image is declared as raw, and begins like a qcow2 image",
        "The guest sees header and tables in place of its disk, unless it has a qcow2 image on its "
        "raw disk on purpose. Mostly the format was mistaken when the overlay was made.",
        "if it was: `chainmerge relink IMAGE --backing BASE` with `--format BASE=qcow2`",
    ),
    _finding(
        "base-larger",
        "a base has a larger disk than the overlay on it",
        "The base was resized after the overlay was made, or another image has its name. The guest "
        "sees the smaller disk. A base that is smaller than its overlay is nothing unusual.",
        "`chainmerge plan OVERLAY` compares both, and says what speaks against them",
    ),
    _finding(
        "base-written-later",
        "a base was written after the overlay on it",
        "An overlay holds what differs from a base that does not change. If the base was used "
        "alone, started as a VM for instance, the overlay shows wrong data by now, and one of the "
        "two is to be given up. A restore, a copy or a change of bitmaps would also explain it; "
        "and so does a merge further down, if the base has a backing file itself.",
        "`chainmerge plan OVERLAY` compares both, and says what speaks against them",
    ),
    _finding(
        "base-created-later",
        "a base is younger than the overlay on it",
        "The file that has the base's name was created after the overlay. It was copied, moved "
        "between file systems or restored from a backup, or exchanged for another one.",
        "`chainmerge plan OVERLAY` compares both, and says what speaks against them",
    ),
    _finding(
        "unusable-checkpoint",
        "a checkpoint is recorded, and no backup can use it",
        "A backup needs a bitmap of the same name in every image from the checkpoint up to the "
        "active one. This name is valid in the active image, but has a gap below it, or is broken "
        "there, so libvirt refuses it and the next backup is a full one.",
        _DROP,
    ),
    _finding(
        "file-system-filling",
        "a file system has little room for what its images may grow",
        "Overlays grow with every write of their guests, up to the size of the disk. When the file "
        "system is full, the guests stop or see errors. What is free and what they may grow "
        "together is in the evidence.",
        f"{_MERGE}, which needs room itself: see its plan; or enlarge the file system",
    ),
    _finding(
        "device-filling",
        "an image has nearly filled the block device that it lies on",
        "An image on a block device grows within it, up to its end. Whoever manages the volume has "
        "to extend it in time: when it is full, the guest stops.",
        f"extend the device; or {_MERGE}",
    ),
    _finding(
        "unused-image",
        "an image is used by nobody",
        "No domain of this libvirt has it as a disk, no process has it open, and no image that was "
        "found stands on it. Domains of other hosts, backups and templates are not known here.",
        "find out whose it was; `chainmerge info IMAGE` shows what it stands on",
    ),
)
"""What `check`, `repair`, `bitmaps list` and `scan` may find, besides errors."""
