# SPDX-License-Identifier: Apache-2.0
"""Images that are damaged, leak, or cannot be read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.documents.scan import ScanFinding, Severity
from chainmerge.inventory.found import NOT_DAMAGE

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from chainmerge.inventory.findings.scene import Scene
    from chainmerge.inventory.found import FoundImage


def damaged_images(scene: Scene) -> Iterator[ScanFinding]:
    """Findings about single images."""
    for image in scene.graph.images.values():
        yield from _unreadable(scene, image)
        if scene.is_idle(image):
            yield from _marked(scene, image)
        yield from _checked(scene, image)


def other_troubles(scene: Scene, told: Collection[str]) -> Iterator[ScanFinding]:
    """What keeps a chain from being read that nothing else tells.

    Args:
        scene: what was found.
        told: images of which something is told that may be the reason.
    """
    found: dict[tuple[str, str], ScanFinding] = {}
    for leaf in scene.graph.leaves:
        facts = scene.chains.get(leaf.identity)
        if facts is None or facts.trouble is None or facts.problem is None:
            continue
        line = list(scene.graph.down_from(leaf))
        if not facts.members and any(image.path in told for image in line):
            continue
        if not all(map(scene.is_idle, line)):
            # A table that is being written may be half of it.
            continue
        culprit = next((image for image in line if image.path in facts.problem), leaf)
        damaged = bool(facts.members) and facts.trouble not in NOT_DAMAGE
        finding = ScanFinding(
            code=facts.trouble,
            severity=Severity.CRITICAL if damaged else Severity.WARNING,
            image=culprit.path,
            sentence=facts.problem,
            evidence={"images": len(line)},
            command=scene.command_for(culprit, "check" if damaged else "info"),
        )
        # Many chains can stand on one that is damaged.
        found.setdefault((finding.code, finding.image), finding)
    yield from found.values()


def _unreadable(scene: Scene, image: FoundImage) -> Iterator[ScanFinding]:
    problem = image.content.problem
    if problem is None:
        return
    damaged = problem.code not in NOT_DAMAGE
    yield ScanFinding(
        code=problem.code,
        severity=Severity.CRITICAL if damaged else Severity.WARNING,
        image=image.path,
        sentence=problem.sentence,
        evidence={"file_bytes": image.stamp.size},
        command=scene.command_for(image, "repair" if damaged else "info"),
    )


def _marked(scene: Scene, image: FoundImage) -> Iterator[ScanFinding]:
    if not (image.content.corrupt or image.content.dirty):
        return
    repair = scene.command_for(image, "repair")
    if image.content.corrupt:
        sentence = f"QEMU has marked {image.path} corrupt, and does not open it for writing"
        yield ScanFinding("corrupt-bit", Severity.CRITICAL, image.path, sentence, {}, repair)
    if image.content.dirty:
        sentence = f"{image.path} was not closed properly (dirty bit): refcounts may be stale"
        yield ScanFinding("dirty-bit", Severity.WARNING, image.path, sentence, {}, repair)


def _checked(scene: Scene, image: FoundImage) -> Iterator[ScanFinding]:
    checked = image.content.checked
    if checked is None:
        return
    if checked.corruptions:
        yield ScanFinding(
            code="corruption",
            severity=Severity.CRITICAL,
            image=image.path,
            sentence=f"the tables of {image.path} contradict themselves: {checked.first}",
            evidence={"corruptions": checked.corruptions},
            command=scene.command_for(image, "check"),
        )
    if checked.leaked_bytes:
        yield ScanFinding(
            code="leaked-clusters",
            severity=Severity.INFO,
            image=image.path,
            sentence=f"{image.path} has leaked clusters, which nothing uses",
            evidence={"leaked_bytes": checked.leaked_bytes},
            command=scene.command_for(image, "repair"),
        )
