# SPDX-License-Identifier: Apache-2.0
"""The demo's scenario, number by number of stale bitmaps, on volumes that cannot grow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from demo.outcome import look_at, same_content
from demo.scenario import VOLUME_SIZE, Workshop
from demo.volumes import FixedVolume, LimitedFile, loop_volume
from demo.ways import merge_with_chainmerge, merge_with_qemu_img
from tests.support.machine import qemu_major
from tests.support.qemu import assert_clean, bitmap_names, dirty_ranges

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Around each number at which something else goes wrong with QEMU's commands; the others
# take long and are part of the long runs.
_TELLING = (0, 5, 6, 9, 10, 13, 14, 32)
ALL_COUNTS = [
    pytest.param(stale, marks=() if stale in _TELLING else pytest.mark.soak) for stale in range(33)
]


def _far_from_others(directory: Path) -> Path:
    """A place below *directory* where the images of other tests do not look for relatives.

    Overlays stay there that name a loop device, whose number another test gets later.
    """
    place = directory / "not" / "beside" / "others"
    place.mkdir(parents=True)
    return place


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[FixedVolume]:
    with loop_volume(tmp_path, VOLUME_SIZE) as volume:
        yield volume


@pytest.fixture(scope="module")
def one_good(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(_far_from_others(tmp_path_factory.mktemp("one-good")))


@pytest.fixture(scope="module")
def three_good(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    directory = _far_from_others(tmp_path_factory.mktemp("three-good"))
    return Workshop(directory, shared=("both-1", "both-2"))


@pytest.mark.parametrize("stale", ALL_COUNTS)
@pytest.mark.parametrize("kind", ["one_good", "three_good"])
def test_merge_is_right_with_any_number_of_stale_bitmaps(
    loop: FixedVolume, request: pytest.FixtureRequest, kind: str, stale: int
) -> None:
    workshop: Workshop = request.getfixturevalue(kind)
    case = workshop.case(loop, stale)
    attempt = merge_with_chainmerge(case)
    assert attempt.succeeded, attempt.steps
    assert same_content(case)
    assert_clean(loop.path)
    assert {name: b["flags"] for name, b in bitmap_names(loop.path).items()} == {
        key: ["auto"] for key in workshop.good_bitmaps
    }
    for name in workshop.good_bitmaps:
        assert dirty_ranges(loop.path, name) == workshop.dirty_ranges(name)


def test_the_limit_of_a_plain_file_is_kept(one_good: Workshop, tmp_path: Path) -> None:
    volume = LimitedFile(tmp_path / "base.qcow2", VOLUME_SIZE)
    case = one_good.case(volume, 14)
    attempt = merge_with_chainmerge(case)
    assert attempt.succeeded, attempt.steps
    assert look_at(case, one_good).right
    assert volume.path.stat().st_size <= VOLUME_SIZE


# Newer versions of QEMU say by an exit status that a bitmap was lost; 7.2 on standard error alone.
LOST = 1 if qemu_major() >= 10 else 0


@pytest.mark.parametrize(
    ("stale", "statuses", "state", "content_right"),
    [(5, [0, 0, 0], "valid", True), (6, [0, 0, LOST], "in-use", True), (14, [1], "absent", False)],
)
def test_the_scenario_is_as_hard_as_it_claims(
    loop: FixedVolume,
    one_good: Workshop,
    stale: int,
    statuses: list[int],
    state: str,
    content_right: bool,
) -> None:
    case = one_good.case(loop, stale)
    attempt = merge_with_qemu_img(case)
    outcome = look_at(case, one_good)
    assert [step.status for step in attempt.steps] == statuses
    assert (outcome.good, outcome.content_right) == (state, content_right)
