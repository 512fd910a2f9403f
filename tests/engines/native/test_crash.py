# SPDX-License-Identifier: Apache-2.0
"""Whenever the power goes in a native merge: the guest sees its disk, a rerun completes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chainmerge.engines.metadata.errors import NotEnoughSpace
from chainmerge.errors import Interrupted
from chainmerge.qcow2.check import check
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.readable import BytesReadable
from chainmerge.qcow2.refcounts import read_refcount_table
from tests.conftest import SOAK
from tests.engines.native.recorded import (
    SAMPLES,
    Builder,
    Judge,
    each_merge,
    everywhere,
    flushes_before_the_switch,
    needed,
    start_of,
)
from tests.support.crash import (
    SECTOR,
    Flushed,
    RecordingPort,
    crash_states,
)
from tests.support.native_merge import (
    end_of_use,
    reclaimed,
    run,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from chainmerge.chain.view import GuestView


EXHAUSTIVE = 10 if SOAK else 4


# Every state


@everywhere
@each_merge
def test_every_crash_leaves_the_guest_its_disk(
    tmp_path: Path,
    built: Builder,
    name: str,
    device: bool,
    record_property: Callable[[str, object], None],
) -> None:
    merge = built(name)
    start = start_of(merge, device=device)
    port = RecordingPort(start, is_block_device=device)
    run(merge, port)
    judge = Judge(merge, start, tmp_path, device=device)
    judge.assert_complete(bytes(port.content), "no crash")
    judge.ask_qemu_at_the_end(bytes(port.content))
    switch = flushes_before_the_switch(port.log)
    for state in crash_states(start, port.log, seed=11, samples=SAMPLES, exhaustive=EXHAUSTIVE):
        judge.judge(state, switch)
    record_property("states", judge.states)
    record_property("states run on from", judge.rerun)
    record_property("states shown to qemu", judge.seen_by_qemu)
    assert judge.states >= 5


@pytest.mark.parametrize("device", [False, True] if SOAK else [False])
@each_merge
def test_a_merge_that_is_stopped_gives_back_what_it_took(
    tmp_path: Path, built: Builder, name: str, device: bool
) -> None:
    """Also giving back may be interrupted anywhere."""
    merge = built(name)
    start = start_of(merge, device=device)
    port = RecordingPort(start, is_block_device=device)

    def stop(image: Qcow2Image, merged: GuestView) -> None:
        raise Interrupted("just before the switch")

    with pytest.raises(Interrupted):
        run(merge, port, stop)
    judge = Judge(merge, start, tmp_path, device=device)
    assert flushes_before_the_switch(port.log) is None
    for state in crash_states(start, port.log, seed=12, samples=SAMPLES // 4):
        judge.judge(state, None)
    after = Qcow2Image(BytesReadable("stopped", bytes(port.content)))
    report = check(after)
    assert report.clean
    assert not report.hidden_leaks
    blocks = set(read_refcount_table(after).tolist()) - set(
        read_refcount_table(Qcow2Image(BytesReadable("start", start))).tolist()
    )
    # What the refcount table names is in use, so that the file must go on having it.
    assert device or blocks or len(port.content) == len(start)
    assert bytes(port.content[:SECTOR]) == start[:SECTOR]


# The exact size


@each_merge
def test_the_size_that_was_worked_out_is_enough_and_no_less_is(
    tmp_path: Path, built: Builder, name: str
) -> None:
    merge = built(name)
    content = reclaimed(merge.base_content)
    size = needed(merge, content)
    start = start_of(merge, device=True, size=size)
    port = RecordingPort(start, is_block_device=True)
    outcome = run(merge, port)
    assert outcome.required_size <= size
    Judge(merge, start, tmp_path, device=True).assert_complete(bytes(port.content), "exact size")
    cluster_size = Qcow2Image(BytesReadable("base", content)).header.cluster_size
    if size == end_of_use(content) * cluster_size:
        return
    start = start_of(merge, device=True, size=size - cluster_size)
    port = RecordingPort(start, is_block_device=True)
    with pytest.raises(NotEnoughSpace):
        run(merge, port)
    assert all(isinstance(event, Flushed) for event in port.log)
    assert bytes(port.content) == start
