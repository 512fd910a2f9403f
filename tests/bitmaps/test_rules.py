# SPDX-License-Identifier: Apache-2.0
"""The rules for bitmaps: one readable row for every situation."""

from __future__ import annotations

import pytest
from msgspec import Struct
from msgspec.structs import replace

from chainmerge.bitmaps.rules import (
    Fate,
    Rule,
)
from tests.bitmaps.rows import decide_one


class Row(Struct, frozen=True):
    situation: str
    chain: str
    fate: str
    rule: str
    sources: str = ""  # the images whose bits are united, lowest first
    granularity: int | None = None
    lost: bool = False  # a checkpoint that could be used is lost
    above: bool = False  # an image above top has the name
    top_stays: bool = False
    tombstone: str = ""  # "" none, "stays", "until top goes"
    unguarded: bool = False


KEPT = [
    Row(
        "valid in base and top",
        "base=valid top=valid",
        "keep",
        "kept-everywhere",
        sources="base top",
        granularity=65536,
    ),
    Row(
        "valid in base and every merged image",
        "base=valid s1=valid s2=valid top=valid",
        "keep",
        "kept-everywhere",
        sources="base s1 s2 top",
        granularity=65536,
    ),
    Row(
        "valid further down too: the parents keep their own bits",
        "root=valid base=valid top=valid",
        "keep",
        "kept-everywhere",
        sources="base top",
        granularity=65536,
    ),
    Row(
        "valid in one parent, absent below it",
        "root=absent p1=valid base=valid top=valid",
        "keep",
        "kept-everywhere",
        sources="base top",
        granularity=65536,
    ),
    Row(
        "began in top",
        "base=absent top=valid",
        "keep",
        "kept-from-overlay",
        sources="top",
        granularity=65536,
    ),
    Row(
        "began in top, which has two images below it that know nothing",
        "base=absent s1=absent top=valid/4096",
        "keep",
        "kept-from-overlay",
        sources="top",
        granularity=4096,
    ),
    Row(
        "began in a middle image",
        "root=absent base=absent s1=absent s2=valid top=valid",
        "keep",
        "kept-from-overlay",
        sources="s2 top",
        granularity=65536,
    ),
    Row(
        "children carry it on: nothing changes for the rule",
        "base=absent top=valid",
        "keep",
        "kept-from-overlay",
        sources="top",
        granularity=65536,
        above=True,
        top_stays=True,
    ),
    Row(
        "granularities differ: base is the finest",
        "base=valid/4096 top=valid/65536",
        "keep",
        "kept-everywhere",
        sources="base top",
        granularity=4096,
    ),
    Row(
        "granularities differ: a middle image is the finest",
        "base=valid/65536 s1=valid/512 top=valid/4096",
        "keep",
        "kept-everywhere",
        sources="base s1 top",
        granularity=512,
    ),
    Row(
        "granularity of a parent does not matter",
        "root=valid/512 base=valid/65536 top=valid/4096",
        "keep",
        "kept-everywhere",
        sources="base top",
        granularity=4096,
    ),
    Row(
        "raw parent below a qcow2 base",
        "root=cannot base=valid top=valid",
        "keep",
        "kept-everywhere",
        sources="base top",
        granularity=65536,
    ),
]

STALE = [
    Row("in base, absent from top", "base=valid top=absent", "prune", "stale-in-base"),
    Row("disabled in base, absent from top", "base=disabled top=absent", "prune", "stale-in-base"),
    Row("in-use in base, absent from top", "base=in-use top=absent", "prune", "stale-in-base"),
    Row("in base, in-use in top", "base=valid top=in-use", "prune", "stale-in-base"),
    Row("in base, disabled in top", "base=valid top=disabled", "prune", "stale-in-base"),
    Row("in base and between, not top", "base=valid s1=valid top=absent", "prune", "stale-in-base"),
    Row(
        "stale and a child has the name: child and base are no longer kept apart by top's gap",
        "base=valid top=absent",
        "prune",
        "stale-in-base",
        above=True,
        tombstone="stays",
    ),
    Row(
        "crashed in top, and a child has the name",
        "base=valid top=in-use",
        "prune",
        "stale-in-base",
        above=True,
        tombstone="stays",
    ),
    Row(
        "stale, and top stays without the name",
        "base=valid top=absent",
        "prune",
        "stale-in-base",
        top_stays=True,
    ),
]

GAPS = [
    Row(
        "missing between",
        "base=valid s1=absent top=valid",
        "drop",
        "gap-below",
        tombstone="until top goes",
    ),
    Row(
        "present again below base",
        "root=valid base=absent top=valid",
        "drop",
        "gap-below",
        tombstone="until top goes",
    ),
    Row(
        "present again below base, disabled",
        "root=disabled base=absent top=valid",
        "drop",
        "gap-below",
        tombstone="until top goes",
    ),
    Row(
        "present again below base, in-use",
        "root=in-use base=absent s1=valid top=valid",
        "drop",
        "gap-below",
        tombstone="until top goes",
    ),
    Row(
        "valid in base and top, gap between the parents",
        "root=valid p1=absent base=valid top=valid",
        "drop",
        "gap-below",
        tombstone="until top goes",
    ),
    Row(
        "a tombstone below the gap",
        "base=tombstone s1=absent top=valid",
        "drop",
        "gap-below",
        tombstone="until top goes",
    ),
    Row(
        "gap, and a child has the name",
        "base=valid s1=absent top=valid",
        "drop",
        "gap-below",
        above=True,
        tombstone="stays",
    ),
    Row(
        "gap, and top stays",
        "base=valid s1=absent top=valid",
        "drop",
        "gap-below",
        top_stays=True,
        tombstone="stays",
    ),
]

BROKEN = [
    Row(
        "in-use in base",
        "base=in-use top=valid",
        "drop",
        "broken-in-run",
        tombstone="until top goes",
    ),
    Row(
        "disabled in base",
        "base=disabled top=valid",
        "drop",
        "broken-in-run",
        tombstone="until top goes",
    ),
    Row(
        "in-use between",
        "base=valid s1=in-use top=valid",
        "drop",
        "broken-in-run",
        tombstone="until top goes",
    ),
    Row(
        "disabled between, absent from base",
        "base=absent s1=disabled top=valid",
        "drop",
        "broken-in-run",
        tombstone="until top goes",
    ),
    Row(
        "disabled in the parent: the run goes on below base",
        "root=disabled base=valid top=valid",
        "drop",
        "broken-in-run",
        tombstone="until top goes",
    ),
    Row(
        "in-use two parents down",
        "root=in-use p1=valid base=valid top=valid",
        "drop",
        "broken-in-run",
        tombstone="until top goes",
    ),
    Row(
        "broken between, and a child has the name: the evidence goes away with the merge",
        "base=absent s1=in-use top=valid",
        "drop",
        "broken-in-run",
        above=True,
        tombstone="stays",
    ),
    Row(
        "an earlier merge left a tombstone, and top made the name anew",
        "base=tombstone top=valid",
        "drop",
        "broken-in-run",
        top_stays=True,
        tombstone="stays",
    ),
]

NOT_IN_TOP = [
    Row("in-use in top only", "base=absent top=in-use", "ignore", "not-valid-in-top"),
    Row("disabled in top only", "base=absent top=disabled", "ignore", "not-valid-in-top"),
    Row("middle only", "base=absent s1=valid top=absent", "ignore", "not-valid-in-top"),
    Row(
        "disabled in top, valid between",
        "base=absent s1=valid top=disabled",
        "ignore",
        "not-valid-in-top",
    ),
    Row(
        "in-use in top only, and a child has the name",
        "base=absent top=in-use",
        "drop",
        "not-valid-in-top",
        above=True,
        tombstone="stays",
    ),
    Row(
        "middle only, and a child has the name: top's gap goes away",
        "base=absent s1=valid top=absent",
        "drop",
        "not-valid-in-top",
        above=True,
        tombstone="stays",
    ),
    Row(
        "disabled in top, which stays: it speaks for itself",
        "base=absent top=disabled",
        "ignore",
        "not-valid-in-top",
        top_stays=True,
    ),
]

TOMBSTONES = [
    Row("nobody above has the name", "base=tombstone top=absent", "prune", "tombstone-spent"),
    Row(
        "a child still has the name",
        "base=tombstone top=absent",
        "prune",
        "tombstone-stands",
        above=True,
        tombstone="stays",
    ),
    Row(
        "top is a tombstone itself, a child has the name",
        "base=absent top=tombstone",
        "drop",
        "not-valid-in-top",
        above=True,
        tombstone="stays",
    ),
    Row(
        "top is a tombstone, base has bits",
        "base=valid top=tombstone",
        "prune",
        "stale-in-base",
        above=True,
        tombstone="stays",
    ),
]

BASE_CANNOT_HOLD = [
    Row(
        "valid in top",
        "base=cannot top=valid",
        "drop",
        "base-cannot-hold",
        lost=True,
    ),
    Row(
        "valid in top and in a child",
        "base=cannot top=valid",
        "drop",
        "base-cannot-hold",
        lost=True,
        above=True,
        unguarded=True,
    ),
    Row(
        "valid in top, which stays right on its own",
        "base=cannot top=valid",
        "drop",
        "base-cannot-hold",
        lost=True,
        top_stays=True,
    ),
    Row(
        "top stays, but would lose what the middle image recorded",
        "base=cannot s1=valid top=valid",
        "drop",
        "base-cannot-hold",
        lost=True,
        top_stays=True,
        unguarded=True,
    ),
    Row(
        "bitmaps in a version 2 base cannot be trusted, and top stays",
        "base=v2:in-use top=valid",
        "drop",
        "broken-in-run",
        top_stays=True,
        unguarded=True,
    ),
    Row(
        "crashed in top: nothing to lose",
        "base=cannot top=in-use",
        "ignore",
        "not-valid-in-top",
    ),
    Row(
        "crashed in top, and a child has the name: nothing to lose, but a false checkpoint",
        "base=cannot top=in-use",
        "drop",
        "not-valid-in-top",
        above=True,
        unguarded=True,
    ),
    Row(
        "broken between: was lost already",
        "base=cannot s1=in-use top=valid",
        "drop",
        "broken-in-run",
    ),
    Row(
        "version 2 base over a parent that has the name: a gap already",
        "root=valid base=cannot top=valid",
        "drop",
        "gap-below",
    ),
]

TABLE = {
    "kept": KEPT,
    "stale": STALE,
    "gap": GAPS,
    "broken": BROKEN,
    "not valid in top": NOT_IN_TOP,
    "tombstone": TOMBSTONES,
    "base cannot hold": BASE_CANNOT_HOLD,
}


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=f"{group}: {row.situation}")
        for group, rows in TABLE.items()
        for row in rows
    ],
)
def test_every_situation(row: Row) -> None:
    decision = decide_one(row.chain, above=row.above, top_stays=row.top_stays)
    assert decision is not None
    images = [part.partition("=")[0] for part in row.chain.split()]
    tombstone = {
        (False, False): "",
        (False, True): "until top goes",
        (True, True): "stays",
    }[decision.tombstone, decision.tombstone_while_top_exists]
    assert row == replace(
        row,
        fate=decision.fate,
        rule=decision.rule,
        sources=" ".join(images[index] for index in decision.sources),
        granularity=decision.granularity,
        lost=decision.loses_valid_checkpoint,
        tombstone=tombstone,
        unguarded=decision.unguarded,
    )


def test_every_rule_and_every_fate_has_a_row() -> None:
    rows = [row for group in TABLE.values() for row in group]
    assert {row.rule for row in rows} == set(Rule)
    assert {row.fate for row in rows} == set(Fate)
