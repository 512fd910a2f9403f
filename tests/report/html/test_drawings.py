# SPDX-License-Identifier: Apache-2.0
"""Drawings are as large as the numbers that they stand for."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import pytest

from chainmerge.documents.disk_map import DiskMap, MapColumn
from chainmerge.documents.text import printable
from chainmerge.report.html.drawings import (
    Moment,
    Part,
    TreeStep,
    bar,
    map_of_disk,
    states_of_checkpoint,
    tree_step,
    trend,
)


def rectangles(drawing: str) -> list[tuple[str, float, float, float, float]]:
    """Class, x, y, width and height of each, without per cent signs."""
    found = ET.fromstring(drawing).iter("rect")
    return [
        (
            one.attrib["class"],
            number(one.attrib["x"]),
            number(one.attrib["y"]),
            number(one.attrib["width"]),
            number(one.attrib["height"]),
        )
        for one in found
    ]


def number(text: str) -> float:
    return float(text.rstrip("%"))


def test_a_bar_has_its_parts_side_by_side() -> None:
    drawn = bar([Part("visible", 30), Part("hidden", 10), Part("bitmaps", 0)], 80, "words")
    assert rectangles(drawn) == [
        ("visible", 0, 0, 37.5, 100),
        ("hidden", 37.5, 0, 12.5, 100),
    ]
    assert ET.fromstring(drawn).findtext("title") == "words"


def test_what_is_there_at_all_is_seen_and_nothing_leaves_the_bar() -> None:
    parts = rectangles(bar([Part("visible", 10**9), Part("hidden", 1)], 10**9 + 1, ""))
    assert sum(width for _, _, _, width, _ in parts) <= 100
    parts = rectangles(bar([Part("hidden", 1), Part("visible", 10**9)], 10**9 + 1, ""))
    assert parts[0][3] == 0.4
    assert rectangles(bar([Part("visible", 0)], 0, "")) == []


def test_the_map_has_a_row_for_each_layer_and_a_height_for_each_share() -> None:
    columns = (
        MapColumn(0, 100, 100, 0),
        MapColumn(0, 100, 100, 0),
        MapColumn(None, 0, 0, 100),
        MapColumn(2, 25, 40, 0),
        MapColumn(1, 1, 1, 0),
    )
    drawn = map_of_disk(DiskMap(500, 100, ("a", "b", "c"), columns), ["x", "y", "z"], "")
    assert rectangles(drawn) == [
        ("x", 0, 16, 2, 8),
        ("z", 3, 6, 1, 2),
        ("y", 4, 15, 1, 1),
    ]
    assert ET.fromstring(drawn).attrib["viewBox"] == "0 0 5 24"


def test_the_states_of_a_checkpoint() -> None:
    states = ["absent", "valid", "valid", "in-use", "disabled", "tombstone"]
    drawn = rectangles(states_of_checkpoint(states, ""))
    assert [(look, x, width) for look, x, _, width, _ in drawn] == [
        ("good", 1, 2),
        ("broken", 3, 1),
        ("caution", 4, 1),
        ("caution", 5, 1),
    ]
    heights = [height for _, _, _, _, height in drawn]
    assert len({*heights[1:]}) == 3, "they differ in more than colour"


@pytest.mark.parametrize(
    ("step", "lines"),
    [
        (TreeStep(True, True, "stays"), 0),
        (TreeStep(True, False, "goes", moves_below=True), 1 + 2),
        (TreeStep(False, False, "goes", True, True), 2 + 3),
        (TreeStep(False, True, "result", moves_above=True), 1 + 2),
    ],
)
def test_a_step_of_the_tree(step: TreeStep, lines: int) -> None:
    drawn = tree_step(step)
    assert len(re.findall("<line", drawn)) == lines
    assert ("head" in drawn) == (step.mark == "result")
    ET.fromstring(drawn)


def test_a_trend_begins_at_the_left_and_ends_at_the_right() -> None:
    drawn = trend([Moment(100, 0), Moment(150, 10), Moment(200, 5)], "")
    (curve,) = ET.fromstring(drawn).iter("polyline")
    assert curve.attrib["points"] == "0,100 500,4 1000,52"


@pytest.mark.parametrize("text", ["</title><script>", "a\x1b[31m\n\u202e", "&lt;", "\udcff"])
def test_what_is_said_of_a_drawing_is_text(text: str) -> None:
    drawn = bar([Part("visible", 1)], 1, text)
    said = ET.fromstring(drawn).findtext("title")
    assert said == printable(text)
    assert drawn.isprintable()
