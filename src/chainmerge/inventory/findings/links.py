# SPDX-License-Identifier: Apache-2.0
"""Chains that do not hold together: lost, exchanged and unfit bases, loops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from chainmerge.arithmetic.counting import counted
from chainmerge.chain.model import ImageFormat, format_meant_by
from chainmerge.documents.scan import ScanFinding, Severity
from chainmerge.inventory.found import NOT_DAMAGE
from chainmerge.inventory.graph import is_root
from chainmerge.planning.facts import is_later

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.inventory.findings.scene import Scene
    from chainmerge.inventory.found import FoundImage

_SEVERITIES: Final = {
    "backing-file-missing": Severity.CRITICAL,
    "backing-file-outside": Severity.WARNING,
    "cannot-open": Severity.WARNING,
    "backing-name-unusable": Severity.WARNING,
    "backing-name-json": Severity.INFO,
    "backing-name-remote": Severity.INFO,
}
_NOT_KNOWN: Final = frozenset(_SEVERITIES) - {"backing-file-missing"}
"""Where nobody can say that anything is lost."""


def broken_links(scene: Scene) -> Iterator[ScanFinding]:
    """Findings about images and what they stand on."""
    looping = {image.identity for loop in scene.graph.loops for image in loop}
    for image in scene.graph.images.values():
        yield from _not_followed(scene, image)
        base = scene.graph.base_of(image)
        if base is not None and image.identity not in looping:
            yield from _format_differs(scene, image, base)
            yield from _size_differs(scene, image, base)
            yield from _times_differ(scene, image, base)
    for loop in scene.graph.loops:
        names = ", ".join(image.path for image in loop)
        yield ScanFinding(
            code="backing-cycle",
            severity=Severity.CRITICAL,
            image=loop[0].path,
            sentence=f"{loop[0].path} stands on itself, over {names}: the chain has no end",
            evidence={"images": len(loop)},
            command=scene.command_for(loop[0], "relink"),
        )
    for leaf in scene.graph.leaves:
        yield from _without_root(scene, leaf)


def _not_followed(scene: Scene, image: FoundImage) -> Iterator[ScanFinding]:
    problem = None if image.link is None else image.link.problem
    if problem is None or image.link is None:
        return
    words: tuple[str, ...] = ("relink",)
    if problem.code == "backing-file-outside" and image.link.path is not None:
        directory = str(image.link.path.parent)
        words = ("info", "--allow-backing", directory)
    yield ScanFinding(
        code=problem.code,
        severity=_SEVERITIES.get(problem.code, Severity.WARNING),
        image=image.path,
        sentence=problem.sentence,
        evidence={},
        command=scene.command_for(image, *words),
    )


def _without_root(scene: Scene, leaf: FoundImage) -> Iterator[ScanFinding]:
    """An image above one that has lost its base, or cannot be read."""
    line = list(scene.graph.down_from(leaf))
    last = line[-1]
    problem = None if last.link is None else last.link.problem
    is_a_loop = scene.graph.base_of(last) is not None
    if not is_a_loop and problem is None and last.content.problem is None:
        # It could not be looked at, or is another one by now.
        return
    if last is leaf or is_root(last) or (problem is not None and problem.code in _NOT_KNOWN):
        return
    if last.content.problem is not None and last.content.problem.code in NOT_DAMAGE:
        return
    if is_a_loop:
        why = "which stands on itself"
    else:
        why = "which has lost its base" if problem is not None else "which cannot be read"
    yield ScanFinding(
        code="orphan",
        severity=Severity.CRITICAL,
        image=leaf.path,
        sentence=f"{leaf.path} stands on {last.path}, {why}: its disk cannot be read any more",
        evidence={"images": len(line)},
        command=scene.command_for(last, "relink" if last.is_overlay else "repair"),
    )


def _format_differs(scene: Scene, image: FoundImage, base: FoundImage) -> Iterator[ScanFinding]:
    declared, actual = image.content.backing_format, base.content.format
    if declared is None:
        is_raw = actual != ImageFormat.QCOW2
        as_raw = ("--format", f"{base.path}={ImageFormat.RAW}") if is_raw else ()
        yield ScanFinding(
            code="backing-format-missing" if is_raw else "format-not-declared",
            severity=Severity.WARNING,
            image=image.path,
            sentence=(
                f"{image.path} does not declare the format of its backing file {base.path}: "
                "libvirt does not start a VM with it"
            ),
            evidence={},
            command=scene.command_for(image, "relink", "--backing", base.path, *as_raw),
        )
        return
    meant = format_meant_by(declared)
    if meant == ImageFormat.QCOW2 and actual != ImageFormat.QCOW2:
        yield ScanFinding(
            code="wrong-format",
            severity=Severity.CRITICAL,
            image=image.path,
            sentence=(
                f"{image.path} declares its backing file {base.path} as qcow2, but that does not "
                "begin like a qcow2 image: it is damaged, or another file has its name"
            ),
            evidence={},
            command=scene.command_for(image, "relink"),
        )
    elif meant == ImageFormat.RAW and actual == ImageFormat.QCOW2:
        yield ScanFinding(
            code="qcow-read-as-raw",
            severity=Severity.WARNING,
            image=image.path,
            sentence=(
                f"{image.path} declares its backing file {base.path} as raw, but that begins like "
                "a qcow2 image: the guest sees tables instead of its disk"
            ),
            evidence={},
            command=scene.command_for(image, "info"),
        )


def _size_differs(scene: Scene, image: FoundImage, base: FoundImage) -> Iterator[ScanFinding]:
    below, above = base.content.virtual_size, image.content.virtual_size
    if below is None or above is None or below <= above:
        return
    yield ScanFinding(
        code="base-larger",
        severity=Severity.WARNING,
        image=image.path,
        sentence=(
            f"{base.path} has a larger disk than {image.path}, which stands on it: it was resized "
            "under its overlay, or another image has its name"
        ),
        evidence={"base_bytes": below, "overlay_bytes": above},
        command=scene.command_for(image, "plan"),
    )


def _times_differ(scene: Scene, image: FoundImage, base: FoundImage) -> Iterator[ScanFinding]:
    if base.stamp.is_device or image.stamp.is_device:
        return
    if not (scene.is_idle(image) and scene.is_idle(base)):
        return
    if is_later(base.stamp.written_ns, image.stamp.written_ns):
        later = base.stamp.written_ns - image.stamp.written_ns
        yield ScanFinding(
            code="base-written-later",
            # A merge below an idle overlay writes to the header of what is in between.
            severity=Severity.INFO if base.is_overlay else Severity.WARNING,
            image=image.path,
            sentence=(
                f"{base.path} was written {_lapse(later)} after {image.path}, which stands on it: "
                "if somebody used it alone, the overlay shows wrong data"
            ),
            evidence={"seconds": later // 10**9},
            command=scene.command_for(image, "plan"),
        )
    elif is_later(base.content.born_ns, image.content.born_ns):
        assert base.content.born_ns is not None
        assert image.content.born_ns is not None
        later = base.content.born_ns - image.content.born_ns
        yield ScanFinding(
            code="base-created-later",
            severity=Severity.INFO,
            image=image.path,
            sentence=(
                f"{base.path} was created {_lapse(later)} after {image.path}, which stands on it: "
                "it was copied, restored or exchanged"
            ),
            evidence={"seconds": later // 10**9},
            command=scene.command_for(image, "plan"),
        )


def _lapse(nanoseconds: int) -> str:
    seconds = nanoseconds // 10**9
    if seconds < 1:
        return "less than a second"
    for unit, length in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * length:
            return counted(seconds // length, unit)
    return counted(seconds, "second")
