# SPDX-License-Identifier: Apache-2.0
"""A VM merges encrypted images, with keys that only it has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chainmerge import live
from chainmerge.options import LiveOptions
from tests.support.encrypted import DISK, Encrypted, build
from tests.support.live_scenario import stored_bits
from tests.support.live_vm import DEVICE, Guest, running_vm, separate_nodes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

pytestmark = pytest.mark.timeout(120)


def command_line(chain: Encrypted, images: Sequence[Path]) -> list[str]:
    options = separate_nodes(images)
    for number, image in enumerate(images):
        at = next(i for i, one in enumerate(options) if f'"node-name": "image{number}"' in one)
        if str(image) in chain.key_files:
            its_key = f', "encrypt": {{"format": "luks", "key-secret": "key{number}"}}}}'
            options[at] = options[at].removesuffix("}") + its_key
    return [*chain.secrets(), *options]


@pytest.mark.parametrize("kinds", ["EE", "EEP"])
def test_the_vm_has_the_keys(tmp_path: Path, kinds: str) -> None:
    chain = build(tmp_path / "chain", kinds)
    before = chain.content(len(kinds) - 1)
    top = chain.images[1]
    with running_vm(
        tmp_path / "vm", chain.images, lambda images: command_line(chain, images)
    ) as vm:
        with Guest(vm, 3, DISK) as guest, live.QmpVm(str(vm.qmp), device=DEVICE) as disk:
            report = live.merge(disk, top, options=LiveOptions(delete=True))
            guest.wait_for(len(guest.journal) + 10)
        vm.quit()
    assert any("encrypted" in warning for warning in report.warnings)
    assert not top.exists()
    assert set(stored_bits(chain.base)) == {"both"}
    left = Encrypted((chain.images[0], *chain.images[2:]), chain.key_files)
    assert left.content(len(left.images) - 1) == guest.applied_to(before)
