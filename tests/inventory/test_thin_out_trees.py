# SPDX-License-Identifier: Apache-2.0
"""Random trees with checkpoints are thinned out by random rules: nothing is lost, kills included.

QEMU says what each image shows and which bits its checkpoints have, before and after.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

import chainmerge
from chainmerge.documents.retention import RetentionRule
from chainmerge.options import Retention
from chainmerge.records.thinning import THINNING
from tests.conftest import SOAK
from tests.inventory.trees import DAY, Tree, View, assert_all_clean, random_tree, view_of

if TYPE_CHECKING:
    from chainmerge.documents.retention import SnapshotFate, ThinOutReport

TREES: Final = 200 if SOAK else 6
KILLS: Final = 200 if SOAK else 8


PATTERNS: Final = {
    ("nothing",): set[int](),
    ("s1.*",): {1},
    ("s2.*",): {2},
    ("nothing", "s[13].*"): {1, 3},
}
"""By patterns, the indexes of the images that they keep."""


def random_rules(seed: int, count: int) -> Retention:
    rng = random.Random(-seed - 1)
    last = rng.choice((None, 0, 1, 2))
    within = rng.choice((None, None, DAY * rng.randint(1, count) + DAY // 2))
    keep = rng.choice(tuple(PATTERNS))
    if last is None and within is None and not PATTERNS[keep] & set(range(count - 1)):
        # Patterns alone of which none matches are refused.
        last = 0
    return Retention(last, within, keep, keep_checkpoints=rng.random() < 0.2)


def kept_by(rules: Retention, tree: Tree) -> set[int]:
    """What the rules keep, worked out anew; but for what is kept for its checkpoints."""
    snapshots = range(len(tree.chain) - 1)
    kept = {index for index in snapshots if index >= len(snapshots) - (rules.keep_last or 0)}
    if rules.keep_within is not None:
        kept |= {i for i in snapshots if (len(snapshots) - i) * DAY <= rules.keep_within}
    return kept | (PATTERNS[rules.keep] & set(snapshots))


class Expected:
    """What a tree shows before anything is done to it."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.views: dict[Path, View] = {
            image: view_of(image) for image in (*tree.chain, *(other for other, _ in tree.others))
        }

    def assert_still_shown(self, fates: tuple[SnapshotFate, ...]) -> None:
        stay = {self.tree.directory / Path(one.image).name for one in fates if one.stays}
        for image, before in self.views.items():
            if image in self.tree.chain[:-1] and image not in stay:
                assert not image.exists(), image
                continue
            after = view_of(image)
            assert after.shown == before.shown, image
            assert after.checkpoints == before.checkpoints, image
        assert_all_clean(self.tree.directory)
        assert chainmerge.status([self.tree.directory]).merges == ()
        assert not list(self.tree.directory.glob(f".*{THINNING.suffix}"))


def assert_decided_as_expected(
    tree: Tree, rules: Retention, fates: tuple[SnapshotFate, ...]
) -> None:
    assert [one.image for one in fates] == [str(image) for image in tree.chain[:-1]]
    must = kept_by(rules, tree) | tree.branching
    for index, one in enumerate(fates):
        if index in must:
            assert one.stays, one
        elif one.stays:
            assert one.rule is RetentionRule.KEEP_CHECKPOINTS, one
            assert rules.keep_checkpoints


def thinned(tree: Tree, rules: Retention, now: float) -> ThinOutReport:
    return chainmerge.thin_out(tree.leaf, rules, now=now)


@pytest.mark.parametrize("seed", range(TREES))
def test_nothing_is_lost(tmp_path: Path, seed: int) -> None:
    now = time.time() + 1
    tree = random_tree(tmp_path, seed, now)
    rules = random_rules(seed, len(tree.chain))
    expected = Expected(tree)
    plan = chainmerge.plan_thin_out(tree.leaf, rules, now=now)
    assert plan.feasible, plan.refusals
    assert_decided_as_expected(tree, rules, plan.snapshots)
    report = thinned(tree, rules, now)
    assert report.snapshots == plan.snapshots
    # Where a merge has nothing to say that is not below already, it is found done.
    assert all(one.is_done for one in report.ranges), report
    assert [one.top for one in report.ranges] == [one.top for one in plan.ranges]
    expected.assert_still_shown(report.snapshots)
    # By then nothing is left to go.
    again = thinned(tree, rules, now)
    assert again.ranges == ()
    assert len(again.snapshots) == sum(one.stays for one in report.snapshots)


def die_at_call(number: int) -> None:
    """Kill this process at one of the calls after which something is durable, or gone."""
    left = number

    def counted(real: object) -> object:
        def call(*arguments: object, **options: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)  # type: ignore[operator]

        return call

    for name in ("fsync", "fdatasync", "unlink", "rename", "replace", "pwrite", "pwritev"):
        setattr(os, name, counted(getattr(os, name)))


def run_until_killed(tree: Tree, rules: Retention, now: float, call: int) -> bool:
    """Thin it out in a process that dies at a call; whether it did."""
    pid = os.fork()
    if pid == 0:
        try:
            die_at_call(call)
            thinned(tree, rules, now)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0


@pytest.mark.parametrize("seed", range(KILLS))
def test_killed_and_run_again(tmp_path: Path, seed: int) -> None:
    now = time.time() + 1
    tree = random_tree(tmp_path, seed, now)
    rules = random_rules(seed, len(tree.chain))
    expected = Expected(tree)
    decided = chainmerge.plan_thin_out(tree.leaf, rules, now=now).snapshots
    leaf = expected.views[tree.leaf]
    rng = random.Random(seed)
    while run_until_killed(tree, rules, now, rng.randint(1, 90)):
        # The guest's disk is what it was, whenever that was, and so are its checkpoints.
        assert view_of(tree.leaf).shown == leaf.shown
        for other, _ in tree.others:
            assert view_of(other).shown == expected.views[other].shown
    expected.assert_still_shown(decided)


@pytest.mark.soak
def test_trees_reach_what_they_are_for(tmp_path: Path) -> None:
    """Ranges of several images, several ranges, branches, and checkpoints that go on."""
    seen: set[str] = set()
    for seed in range(40):
        directory = tmp_path / str(seed)
        directory.mkdir()
        now = time.time() + 1
        tree = random_tree(directory, seed, now)
        plan = chainmerge.plan_thin_out(tree.leaf, random_rules(seed, len(tree.chain)), now=now)
        seen |= {f"stays by {one.rule}" for one in plan.snapshots}
        seen |= {"several ranges"} if len(plan.ranges) > 1 else set()
        seen |= {"pulls" if one.pulls else "commits" for one in plan.ranges}
        seen |= {"long range" for one in plan.ranges if len(one.delete) > 1}
        seen |= {f"bitmap: {one.fate}" for merge in plan.ranges for one in merge.bitmaps}
        seen |= {"tombstone" for merge in plan.ranges for one in merge.bitmaps if one.tombstone}
        shutil.rmtree(directory)
    assert seen >= {
        "several ranges",
        "long range",
        "pulls",
        "commits",
        "bitmap: keep",
        "bitmap: drop",
        "bitmap: prune",
        "tombstone",
        "stays by keep-last",
        "stays by keep-within",
        "stays by keep",
        "stays by keep-checkpoints",
        "stays by other-branch",
    }, seen
