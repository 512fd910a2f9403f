# SPDX-License-Identifier: Apache-2.0
"""Bitmaps that are broken or stale, and checkpoints that no backup can use.

Nothing is said of chains that a process has open: while a guest runs, what images store of bitmaps
is void.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from chainmerge.arithmetic.counting import counted
from chainmerge.bitmaps.rules import BitmapState, chain_test
from chainmerge.documents.scan import ScanFinding, Severity
from chainmerge.inventory.findings.scene import first_names
from chainmerge.inventory.graph import is_root

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from chainmerge.chain.model import Identity
    from chainmerge.inventory.findings.scene import Scene
    from chainmerge.inventory.found import FoundBitmap, FoundImage


def bitmap_troubles(scene: Scene) -> Iterator[ScanFinding]:
    """Findings about bitmaps."""
    for image in scene.graph.images.values():
        yield from _lost_directory(scene, image)
    above: dict[Identity, FoundImage] = {}
    judged: dict[Identity, set[str]] = defaultdict(set)
    busy: set[Identity] = set()
    for leaf in scene.graph.leaves:
        line = list(scene.graph.down_from(leaf))
        if not any(image.content.bitmaps for image in line):
            continue
        if not (is_root(line[-1]) and all(map(scene.is_idle, line))):
            # What such a line needs is not known.
            busy |= {image.identity for image in line}
            continue
        for image in line:
            above.setdefault(image.identity, leaf)
        usable, incomplete = _names_of(line)
        for image in line:
            judged[image.identity] |= usable | set(incomplete)
        yield from _incomplete(scene, leaf, incomplete)
    for identity, leaf in above.items():
        if identity not in busy:
            image = scene.graph.images[identity]
            yield from _broken(scene, image, leaf)
            yield from _stale(scene, image, leaf, judged[identity])


def _names_of(line: Sequence[FoundImage]) -> tuple[set[str], Mapping[str, str]]:
    """The checkpoints of a chain, given from its leaf down, that a backup can use.

    And those that record in the leaf and cannot be used, with the reason.
    """
    by_image = [{bitmap.name: bitmap for bitmap in image.content.bitmaps} for image in line]
    usable: set[str] = set()
    incomplete: dict[str, str] = {}
    for name in by_image[0]:
        states = [found[name].state if name in found else BitmapState.ABSENT for found in by_image]
        verdict = chain_test(states)
        if verdict.passes:
            usable.add(name)
        elif states[0] is BitmapState.VALID:
            incomplete[name] = verdict.reason
    return usable, incomplete


def _lost_directory(scene: Scene, image: FoundImage) -> Iterator[ScanFinding]:
    problem = image.content.bitmaps_problem
    if problem is not None and scene.is_idle(image):
        yield ScanFinding(
            code="broken-bitmap-directory",
            severity=Severity.WARNING,
            image=image.path,
            sentence=problem.sentence,
            evidence={},
            command=scene.command_for(image, "repair"),
        )


def _incomplete(
    scene: Scene, leaf: FoundImage, incomplete: Mapping[str, str]
) -> Iterator[ScanFinding]:
    if not incomplete:
        return
    name, reason = next(iter(incomplete.items()))
    yield ScanFinding(
        code="unusable-checkpoint",
        severity=Severity.WARNING,
        image=leaf.path,
        sentence=(
            f"no backup of {leaf.path} can use {first_names(list(incomplete))}: "
            f"{name!r} is {reason}"
        ),
        evidence={"checkpoints": len(incomplete)},
        command=scene.command_for(leaf, "bitmaps", "repair"),
    )


def _broken(scene: Scene, image: FoundImage, leaf: FoundImage) -> Iterator[ScanFinding]:
    broken = [one for one in image.content.bitmaps if one.state is BitmapState.IN_USE]
    if not broken:
        return
    yield ScanFinding(
        code="broken-bitmap",
        severity=Severity.WARNING,
        image=image.path,
        sentence=(
            f"{image.path} has {counted(len(broken), 'broken bitmap')} (in-use): "
            f"{first_names([one.name for one in broken])}"
        ),
        evidence=_evidence(broken),
        command=scene.command_for(leaf, "bitmaps", "repair"),
    )


def _stale(
    scene: Scene, image: FoundImage, leaf: FoundImage, judged: set[str]
) -> Iterator[ScanFinding]:
    stale = [
        one
        for one in image.content.bitmaps
        if one.state is not BitmapState.IN_USE and not one.tombstone and one.name not in judged
    ]
    if not stale:
        return
    base = ("prune", "--base", image.path) if image is not leaf else ("list",)
    yield ScanFinding(
        code="unusable-bitmap",
        severity=Severity.INFO,
        image=image.path,
        sentence=(
            f"{image.path} has {counted(len(stale), 'stale bitmap')} that no chain can use: "
            f"{first_names([one.name for one in stale])}"
        ),
        evidence=_evidence(stale),
        command=scene.command_for(leaf, "bitmaps", *base),
    )


def _evidence(bitmaps: Sequence[FoundBitmap]) -> dict[str, int]:
    return {
        "bitmaps": len(bitmaps),
        "stored_bytes": sum(one.stored_bytes for one in bitmaps),
    }
