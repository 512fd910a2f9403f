# SPDX-License-Identifier: Apache-2.0
"""Thin volumes: what a merge takes of their pool is counted, refused or had beforehand.

``tests/vm/guest/test_volumes.py`` has real pools.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge.options import Access, MergeOptions
from chainmerge.storage.volume_errors import ExtensionRefused, ThinPoolFull
from tests.support.children import is_killed
from tests.support.lvm_images import CHUNK, MIB, WRITTEN, Volumes, lvm_images, on_pool
from tests.support.qemu import assert_clean, content, create, qemu_io

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DEVICES = Access(allow_backing=("/dev",))
EXTEND = MergeOptions(extend_pool=True)


@pytest.fixture
def volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Volumes]:
    with lvm_images(tmp_path, monkeypatch) as made:
        yield made


def test_what_it_takes_is_in_the_plan(volumes: Volumes) -> None:
    base, top = on_pool(volumes, 10, 50.0)
    plan = chainmerge.plan(top, None, DEVICES)
    pool = plan.space.pool
    assert pool is not None
    assert pool.name == f"{volumes.group}/pool"
    # LVM gives percents with two decimals.
    assert 5 * MIB * 0.999 < pool.free < 5 * MIB
    assert plan.space.allocates is not None
    assert WRITTEN < plan.space.allocates < WRITTEN + 12 * CHUNK
    assert plan.space.allocates % CHUNK == 0
    assert (plan.refusals, pool.extend_by) == ((), 0)
    expected = content(top)
    chainmerge.merge(top, None, DEVICES)
    assert content(base) == expected
    assert_clean(base)
    assert volumes.lvm.calls("lvextend") == []


def test_a_pool_that_is_too_small_is_refused(volumes: Volumes) -> None:
    base, top = on_pool(volumes, 10, 90.0)
    before = base.read_bytes()
    plan = chainmerge.plan(top, None, DEVICES)
    assert [one.code for one in plan.refusals] == [ThinPoolFull.code]
    with pytest.raises(ThinPoolFull) as caught:
        chainmerge.merge(top, None, DEVICES)
    error = caught.value
    assert error.missing == error.takes - error.free == plan.space.missing > MIB
    assert "--extend-pool" in error.advice
    assert base.read_bytes() == before
    assert volumes.lvm.calls("lvextend") == []


def test_the_metadata_of_a_pool_counts_too(volumes: Volumes) -> None:
    _, top = on_pool(volumes, 40, 50.0)
    volumes.lvm.set_pool("pool", metadata_used=99.0)
    with pytest.raises(ThinPoolFull) as caught:
        chainmerge.merge(top, None, DEVICES)
    assert caught.value.metadata_free < MIB // 50
    assert 0 < caught.value.missing < MIB
    chainmerge.merge(top, None, DEVICES, EXTEND)
    (call,) = volumes.lvm.calls("lvextend")
    assert call == ["--poolmetadatasize", f"{3 * MIB}b", "--", f"{volumes.group}/pool"]


def test_the_pool_is_extended_by_what_is_lacking(volumes: Volumes) -> None:
    base, top = on_pool(volumes, 10, 90.0)
    expected = content(top)
    plan = chainmerge.plan(top, None, DEVICES, EXTEND)
    assert plan.refusals == ()
    assert plan.space.pool is not None
    assert plan.space.pool.extend_by == 2 * MIB
    chainmerge.merge(top, None, DEVICES, EXTEND)
    assert volumes.lvm.calls("lvextend") == [["-L", f"{12 * MIB}b", "--", f"{volumes.group}/pool"]]
    assert content(base) == expected
    assert_clean(base)


def test_killed_once_the_pool_is_extended(volumes: Volumes) -> None:
    base, top = on_pool(volumes, 10, 90.0)
    expected = content(top)
    volumes.lvm.kill_after("lvextend")
    assert is_killed(lambda: chainmerge.merge(top, None, DEVICES, EXTEND))
    volumes.lvm.mend("lvextend")
    assert content(top) == expected
    chainmerge.merge(top, None, DEVICES, EXTEND)
    assert len(volumes.lvm.calls("lvextend")) == 1
    assert content(base) == expected
    assert_clean(base)


def test_more_than_the_group_has(volumes: Volumes) -> None:
    """Of 200 extents the thin volumes take none, and the pool's metadata has a spare."""
    base, top = on_pool(volumes, 195, 99.9)
    before = base.read_bytes()
    with pytest.raises(ThinPoolFull) as caught:
        chainmerge.merge(top, None, DEVICES, EXTEND)
    assert "vgextend" in caught.value.advice
    assert caught.value.missing == 2 * MIB
    assert base.read_bytes() == before


def test_lvm_that_does_not_extend(volumes: Volumes) -> None:
    base, top = on_pool(volumes, 10, 90.0)
    before = base.read_bytes()
    volumes.lvm.break_command("lvextend", 5, "Can't get lock.")
    with pytest.raises(ExtensionRefused, match="Can't get lock"):
        chainmerge.merge(top, None, DEVICES, EXTEND)
    assert base.read_bytes() == before


def test_data_goes_over_the_old_where_the_pool_has_no_room_for_two(volumes: Volumes) -> None:
    base, top = on_pool(volumes, 10, 90.0)
    create(base, 4 * MIB)
    qemu_io(base, "write -q -P 1 0 4M")
    # Neither way is free: which chunks the volume has is not known.
    plan = chainmerge.plan(top, None, DEVICES)
    assert plan.space.placement == "in-place"
    assert [one.code for one in plan.refusals] == [ThinPoolFull.code]


def test_several_disks_in_one_pool_are_counted_together(volumes: Volumes) -> None:
    tops = []
    paths = volumes.chain("base-0", "top-0", "base-1", "top-1")
    volumes.lvm.add_pool(volumes.group, "pool", 10, 65.0, CHUNK)
    for name in ("base-0", "top-0", "base-1", "top-1"):
        volumes.lvm.make_thin(name, "pool")
    volumes.show()
    for base, top in (paths[:2], paths[2:]):
        create(base, 4 * MIB)
        create(top, 4 * MIB, backing=base.name)
        qemu_io(top, f"write -q -P 7 1M {WRITTEN}")
        tops.append(top)
    for top in tops:
        assert chainmerge.plan(top, None, DEVICES).refusals == ()
    with pytest.raises(ThinPoolFull):
        chainmerge.merge_disks(tops, (), DEVICES)
    expected = [content(top) for top in tops]
    chainmerge.merge_disks(tops, (), DEVICES, EXTEND)
    assert [content(paths[0]), content(paths[2])] == expected
