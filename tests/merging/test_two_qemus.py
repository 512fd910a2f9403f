# SPDX-License-Identifier: Apache-2.0
"""Images that one version of QEMU has written are merged, and read by another version.

For ``make test QEMU=DIR``, which names the other version in the environment.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge.options import MergeOptions
from tests.support import qemu
from tests.support.machine import qemu_major
from tests.support.merge_scenario import build

if TYPE_CHECKING:
    from pathlib import Path

    from chainmerge.options import EngineChoice

pytestmark = pytest.mark.two_qemus

INSTALLED = "/usr/bin"


def use(monkeypatch: pytest.MonkeyPatch, commands: str) -> int:
    """Have the QEMU of that directory run from here on; returns its major version."""
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    return qemu_major()


@pytest.mark.parametrize("engine", ["native", "qemu"])
@pytest.mark.parametrize("merged_by_writer", [True, False])
@pytest.mark.parametrize("newer_writes", [True, False])
def test_what_one_writes_the_other_reads(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    newer_writes: bool,
    merged_by_writer: bool,
    engine: EngineChoice,
) -> None:
    newer = os.environ["CHAINMERGE_OTHER_QEMU"]
    writer, reader = (newer, INSTALLED) if newer_writes else (INSTALLED, newer)
    wrote = use(monkeypatch, writer)
    scenario = build(tmp_path / "images")
    if not merged_by_writer:
        use(monkeypatch, reader)
    chainmerge.merge(scenario.top, options=MergeOptions(engine=engine))
    assert use(monkeypatch, reader) != wrote
    scenario.assert_merged()
    qemu.assert_clean(scenario.base)
    # It writes, too, and what chainmerge reads then is what the other wrote.
    qemu.qemu_io(scenario.base, "write -P 7 1M 64k")
    use(monkeypatch, writer)
    qemu.assert_clean(scenario.base)
    assert chainmerge.check_image(scenario.base).clean
