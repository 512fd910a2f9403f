# SPDX-License-Identifier: Apache-2.0
"""Every situation of the rules for bitmaps, merged in a VM and compared with the cold merge."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge import live
from chainmerge.bitmaps.rules import BitmapState
from chainmerge.options import LiveOptions, MergeOptions
from tests.conftest import SOAK
from tests.support.bitmap_situations import (
    CLUSTER,
    Found,
    bitmaps_of,
    build_chain,
    clusters_with_data,
    copied_to,
    passing,
)
from tests.support.domain_vm import running_domain
from tests.support.live_vm import running_vm
from tests.support.qemu import assert_clean, content

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

pytestmark = pytest.mark.timeout(300)

# The images, root first; the second one is base, the third one the first of those merged.
CHAINS = {
    "internal": ("root", "base", "top", "above"),
    "active": ("root", "base", "middle", "top"),
}
KINDS = tuple(CHAINS)
# libvirt takes its time for every name.
SHARES = range(4) if SOAK else range(1)


class Merged:
    """A chain that is merged cold, and its twin that is to be merged in a VM."""

    def __init__(
        self, directory: Path, kind: str, shares: Collection[int], *, delete: bool
    ) -> None:
        self.images = build_chain(directory / "live", CHAINS[kind], shares)
        self.delete = delete
        cold = copied_to(directory / "cold", self.images)
        self.before = content(self.images[-1])
        self.base, self.top = self._ends(self.images)
        base, top = self._ends(cold)
        chainmerge.merge(top, base, options=MergeOptions(delete=delete))
        self.cold_base = bitmaps_of(base)
        self.cold_passing = passing(self._left(cold))

    @property
    def numbers(self) -> range:
        """The merged images, counted from the root."""
        return range(2, self.images.index(self.top) + 1)

    @staticmethod
    def _ends(images: list[Path]) -> tuple[Path, Path]:
        top = next(image for image in images if image.stem == "top")
        return images[1], top

    def _left(self, images: list[Path]) -> list[Path]:
        """The images of the chain after the merge."""
        return [*images[:2], *(image for image in images if image.stem == "above")]

    def options(self) -> LiveOptions:
        return LiveOptions(delete=self.delete)

    def assert_right(self) -> None:
        """Content, and what a backup makes of the checkpoints, are those of the cold merge."""
        left = self._left(self.images)
        assert content(left[-1]) == self.before
        assert_clean(self.base)
        assert passing(left) == self.cold_passing
        state_files = [
            file.name for file in self.base.parent.iterdir() if "chainmerge" in file.name
        ]
        assert state_files == [f".{self.top.name}.chainmerge-merged"]


def coarser(cold: Found, granularity: int) -> Found:
    """What a bitmap that cannot change its granularity has in its place."""
    return Found(cold.state, granularity, cold.in_steps_of(granularity))


@pytest.mark.parametrize("delete", [True, False], ids=["delete", "stay"])
@pytest.mark.parametrize("kind", KINDS)
def test_by_qmp_base_has_what_the_cold_merge_gives(tmp_path: Path, kind: str, delete: bool) -> None:
    merged = Merged(tmp_path / "chains", kind, range(4), delete=delete)
    with running_vm(tmp_path / "vm", merged.images) as vm:
        with vm.disk() as disk:
            live.merge(disk, merged.top, merged.base, options=merged.options())
        vm.quit()
    merged.assert_right()
    found = bitmaps_of(merged.base)
    for name, cold in merged.cold_base.items():
        assert found[name] == coarser(cold, found[name].granularity), name
    # Those that were needed as long as top was there go with the next merge.
    more = [found[name] for name in found.keys() - merged.cold_base.keys()]
    assert all(one.state is BitmapState.DISABLED and not one.dirty for one in more)
    assert not more or delete


@pytest.mark.parametrize("delete", [True, False], ids=["delete", "stay"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", SHARES)
def test_by_libvirt_base_keeps_what_the_cold_merge_keeps(
    tmp_path: Path, uri: str, share: int, kind: str, delete: bool
) -> None:
    """Names that would need a tombstone are gone from the chain; base may record the copy."""
    merged = Merged(tmp_path / "chains", kind, {share}, delete=delete)
    with running_domain(tmp_path / "vm", uri, merged.images) as vm:
        with vm.disk() as disk:
            live.merge(disk, merged.top, merged.base, options=merged.options())
        vm.quit()
    merged.assert_right()
    found = bitmaps_of(merged.base)
    kept = {name: one for name, one in merged.cold_base.items() if one.state is BitmapState.VALID}
    assert found.keys() == kept.keys()
    copied = frozenset[int]().union(*map(clusters_with_data, merged.numbers))
    for name, cold in kept.items():
        assert found[name].state is BitmapState.VALID
        assert cold.in_steps_of(found[name].granularity) <= found[name].dirty, name
        most = cold.in_steps_of(found[name].granularity)
        clusters = Found(cold.state, found[name].granularity, most).in_steps_of(CLUSTER)
        assert found[name].in_steps_of(CLUSTER) <= clusters | copied, name


def test_a_journal_that_has_tombstones_for_libvirt_is_finished(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As earlier versions wrote it: they looked in vain for tombstones that nobody had left."""
    merged = Merged(tmp_path / "chains", "internal", {0}, delete=True)
    monkeypatch.setattr(live.DomainDisk, "leaves_tombstones", True)
    with running_domain(tmp_path / "vm", uri, merged.images) as vm:
        with vm.disk() as disk:
            live.merge(disk, merged.top, merged.base, options=merged.options())
        vm.quit()
    merged.assert_right()
