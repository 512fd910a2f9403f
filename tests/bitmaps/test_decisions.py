# SPDX-License-Identifier: Apache-2.0
"""What a decision on a bitmap says, and which names get one."""

from __future__ import annotations

import pytest

from chainmerge.bitmaps.rules import (
    BitmapState,
    LayerBitmaps,
    Occurrence,
    decide,
    explain_tombstone,
)
from tests.bitmaps.rows import decide_one, layer


def test_names_outside_of_the_merged_range_need_no_decision() -> None:
    assert decide_one("root=valid base=absent top=absent", above=True, top_stays=True) is None


def test_decisions_are_sorted_and_independent() -> None:
    valid = Occurrence(BitmapState.VALID, 65536, None)
    base = LayerBitmaps("base", {"z": valid, "a": valid, "-x": valid}, supports_bitmaps=True)
    top = LayerBitmaps("top", {"z": valid, "m'\"": valid}, supports_bitmaps=True)
    decisions = decide([base, top], 0, {"a"}, top_stays=False)
    assert [(d.name, str(d.fate), d.tombstone) for d in decisions] == [
        ("-x", "prune", False),
        ("a", "prune", True),
        ("m'\"", "keep", False),
        ("z", "keep", False),
    ]


@pytest.mark.parametrize("base_index", [-1, 1, 2])
def test_base_must_be_below_top(base_index: int) -> None:
    chain = [layer("base", "valid"), layer("top", "valid")]
    with pytest.raises(ValueError, match="is not below the top of a chain of 2 images"):
        decide(chain, base_index, (), top_stays=True)


@pytest.mark.parametrize(
    ("chain", "above", "top_stays", "reason"),
    [
        (
            "base=valid s1=valid top=valid",
            False,
            False,
            "'cp1' is valid in base, s1 and top: their union is kept",
        ),
        (
            "base=absent top=valid",
            False,
            False,
            "'cp1' is valid in top and not in any image below: base takes it over",
        ),
        (
            "base=valid top=absent",
            False,
            False,
            "stale: 'cp1' is in base but absent from top, so no chain that reads top can use it",
        ),
        (
            "base=valid top=in-use",
            True,
            False,
            (
                "stale: 'cp1' is in base but in-use in top, so no chain that reads top can use it; "
                "a tombstone is left in base because images above still have the name"
            ),
        ),
        (
            "base=valid s1=absent top=valid",
            False,
            True,
            (
                "'cp1' is valid in top and present again (valid) in base, "
                "but absent from s1 between them: "
                "what was written while s1 was active is recorded nowhere; "
                "a tombstone is left in base because top has the name"
            ),
        ),
        (
            "root=disabled base=valid top=valid",
            False,
            False,
            "'cp1' is valid in top but disabled in root: what was written after that is missing",
        ),
        (
            "base=in-use top=valid",
            False,
            False,
            (
                "'cp1' is valid in top but in-use in base: it was not stored properly and its bits "
                "are worthless"
            ),
        ),
        (
            "base=tombstone top=valid",
            False,
            False,
            "'cp1' is valid in top but a tombstone in base: the checkpoint was found broken before",
        ),
        (
            "base=absent s1=valid top=absent",
            False,
            False,
            "'cp1' is in s1 but absent from top, so no chain that reads top can use it",
        ),
        (
            "base=absent top=in-use",
            False,
            False,
            "'cp1' is in-use in top, so no chain that reads top can use it",
        ),
        (
            "base=tombstone top=absent",
            True,
            False,
            "'cp1' in base is a tombstone and stays one, because images above still have the name",
        ),
        (
            "base=tombstone top=absent",
            False,
            False,
            "'cp1' in base is a tombstone, and no image above top has the name any more",
        ),
        (
            "base=cannot top=valid",
            True,
            False,
            (
                "base is raw or qcow2 version 2 and cannot hold bitmaps, so the valid checkpoint "
                "'cp1' is lost; remove it from the images above, where it would pass for valid but "
                "is not"
            ),
        ),
    ],
)
def test_reasons_in_words(chain: str, above: bool, top_stays: bool, reason: str) -> None:
    decision = decide_one(chain, above=above, top_stays=top_stays)
    assert decision is not None
    assert decision.reason == reason


def test_names_from_hostile_images_cannot_reach_the_terminal_raw() -> None:
    name = "cp\x1b[2J\n\udcff"
    broken = Occurrence(BitmapState.IN_USE, 65536, None)
    chain = [LayerBitmaps(i, {name: broken}, supports_bitmaps=True) for i in ("base", "top")]
    (decision,) = decide(chain, 0, (), top_stays=False)
    assert decision.name == name
    assert decision.reason.isprintable()


def test_tombstones_are_explained() -> None:
    assert "incremental backup" in explain_tombstone()
