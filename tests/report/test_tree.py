# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chainmerge.report.tree import draw_tree


def drawing(nodes: list[tuple[str, str | None]]) -> list[str]:
    return [line.prefix + nodes[line.index][0] for line in draw_tree(nodes)]


def test_a_chain_of_any_length_stays_in_its_column() -> None:
    nodes: list[tuple[str, str | None]] = [("0", None)]
    nodes += [(str(number), str(number - 1)) for number in range(1, 300)]
    assert drawing(nodes) == ["◉ 0", *(f"● {number}" for number in range(1, 300))]


def test_forks_branch_off_and_the_last_goes_on() -> None:
    assert drawing(
        [
            ("base", None),
            ("clone", "base"),
            ("clone of clone", "clone"),
            ("snapshot", "base"),
            ("other", "snapshot"),
            ("active", "snapshot"),
        ]
    ) == [
        "◉ base",
        "├─● clone",
        "│ ● clone of clone",
        "● snapshot",
        "├─● other",
        "● active",
    ]


@given(st.lists(st.tuples(st.integers(0, 9), st.none() | st.integers(0, 12)), max_size=12))
def test_every_image_is_drawn_once_whatever_the_parents(
    images: list[tuple[int, int | None]],
) -> None:
    nodes = [(str(name), None if parent is None else str(parent)) for name, parent in images]
    assert sorted(line.index for line in draw_tree(nodes)) == list(range(len(nodes)))
