# SPDX-License-Identifier: Apache-2.0
"""Images that no program makes: guest clusters that share a host cluster without a snapshot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge.options import DataChoice, MergeOptions
from tests.support import qemu
from tests.support.images import MIB
from tests.support.surgery import get_bytes, put_bytes
from tests.support.wounds import Anatomy

if TYPE_CHECKING:
    from pathlib import Path

COPIED = 1 << 63
CLUSTER = 64 << 10


def make_cluster_4_share_that_of_cluster_0(path: Path) -> None:
    anatomy = Anatomy(path)
    entry = anatomy.number(anatomy.l2) & ~COPIED
    for number in (0, 4):
        put_bytes(path, anatomy.l2 + 8 * number, entry.to_bytes(8))
    put_bytes(path, anatomy.refcount_block + 2 * (entry // CLUSTER), (2).to_bytes(2))


@pytest.mark.parametrize("data", ["cow", "in-place"])
def test_what_remains_shared_stays_what_it_is(tmp_path: Path, data: DataChoice) -> None:
    """The one that stays has no COPIED flag, so the count must not fall to 1; nothing is lost."""
    base = qemu.create(tmp_path / "base.qcow2", MIB)
    qemu.qemu_io(base, "write -P 1 0 128k")
    make_cluster_4_share_that_of_cluster_0(base)
    qemu.assert_clean(base)
    top = qemu.create(tmp_path / "top.qcow2", backing=base.name)
    qemu.qemu_io(top, "write -P 3 0 64k")
    expected = qemu.content(top)
    assert expected[4 * CLUSTER] == 1
    chainmerge.merge(top, options=MergeOptions(data=data))
    assert qemu.content(base) == expected
    found = qemu.check(base)
    assert (found["corruptions"], found["leaks"]) == (0, 1)
    anatomy = Anatomy(base)
    shared = anatomy.number(anatomy.l2 + 8 * 4)
    assert not shared & COPIED
    assert get_bytes(base, anatomy.refcount_block + 2 * (shared // CLUSTER), 2) == b"\0\2"
