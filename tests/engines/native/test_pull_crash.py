# SPDX-License-Identifier: Apache-2.0
"""Whenever the power goes in a pull: top with its old backing file or with the new one."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from chainmerge.chain.layers import layer_of_qcow2
from chainmerge.chain.view import GuestView
from chainmerge.engines.metadata.allocation import stored_free_space
from chainmerge.engines.metadata.bitmap_set import StoredBitmap
from chainmerge.engines.metadata.errors import NotEnoughSpace
from chainmerge.engines.metadata.leaks import reclaim_leaks
from chainmerge.engines.native.commit import Backing, Commit, commit_natively, merged_layers
from chainmerge.engines.native.decisions import MappedDisk
from chainmerge.engines.native.survey import new_tree, place_tree, survey_mapping
from chainmerge.merging.verifying import verify_bitmaps, verify_content, verify_soundness
from chainmerge.options import Direction, Placement
from chainmerge.qcow2.bitmaps import BitmapFlag
from chainmerge.qcow2.bits import BitSet
from chainmerge.qcow2.check import check
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.readable import BytesReadable
from chainmerge.storage.transfer.copying import ReadBack, transfer_into
from tests.conftest import SOAK
from tests.support import qemu
from tests.support.crash import RecordingPort, Written, crash_states
from tests.support.native_merge import trusted_bitmaps

KIB = 1 << 10
MIB = 1 << 20
SAMPLES = 200 if SOAK else 8
RERUN_SAMPLE = 1 if SOAK else 6


@dataclass(frozen=True)
class Scenario:
    """``root <- base <- middle <- top``: options and guest writes of each image."""

    root: list[str] | None = None
    base: list[str] = field(default_factory=lambda: ["write -P 1 0 700k", "write -z 1M 200k"])
    middle: list[str] | None = None
    top: list[str] = field(default_factory=lambda: ["write -P 2 300k 64k", "write -P 3 1300k 4k"])
    base_options: dict[str, Any] = field(default_factory=dict)
    top_options: dict[str, Any] = field(default_factory=dict)
    top_size: int = 2 * MIB
    snapshot: bool = False


ROOT = ["write -P 7 0 1500k"]
SMALL = {"cluster_size": 4096}
SCENARIOS = {
    "plain": Scenario(),
    "over a root": Scenario(root=ROOT),
    "a range": Scenario(root=ROOT, middle=["write -P 4 600k 300k", "discard 64k 64k"]),
    "small clusters into large ones": Scenario(
        root=ROOT, base=["write -P 1 5k 3k", "write -P 1 100k 9k", "write -z 300k 5k"],
        base_options={"cluster_size": 1024},
    ),
    "large clusters into small ones": Scenario(root=ROOT, top_options={"cluster_size": 512}),
    "into subclusters": Scenario(
        root=ROOT, top=["write -P 2 6k 1k", "write -P 3 700k 2k"],
        base=["write -P 1 0 40k", "write -z 690k 30k"],
        base_options={"cluster_size": 512},
        top_options={"cluster_size": 16 * KIB, "extended_l2": "on"},
    ),
    "out of subclusters": Scenario(
        root=ROOT, base=["write -P 1 6k 1k", "write -P 1 40k 5k"],
        base_options={"cluster_size": 16 * KIB, "extended_l2": "on"}, top_options=SMALL,
    ),
    "into a snapshot's clusters": Scenario(
        root=ROOT, snapshot=True, top_options={"cluster_size": 16 * KIB, "extended_l2": "on"},
    ),
    "a smaller base": Scenario(root=ROOT, top_size=3 * MIB),
    "version 2": Scenario(root=ROOT, top_options={"compat": "0.10"}),
    "narrow refcounts": Scenario(top_options={"cluster_size": 512, "refcount_bits": 1}),
    "wide refcounts": Scenario(top_options={"cluster_size": 512, "refcount_bits": 64}),
}  # fmt: skip


@dataclass(frozen=True)
class Built:
    """The chain on disk; top is changed in memory only."""

    paths: tuple[Path, ...]
    base: int
    expected: bytes
    top: bytes
    bitmaps: tuple[StoredBitmap, ...]

    @property
    def backing(self) -> Backing:
        below = self.paths[: self.base]
        return Backing(below[-1].name, "qcow2") if below else Backing(None, None)

    def below(self) -> list[Qcow2Image]:
        lower = self.paths[:-1]
        return [Qcow2Image(BytesReadable(str(path), path.read_bytes())) for path in lower]

    def view(self, content: bytes) -> GuestView:
        """What the guest sees, by the backing file that *content* names."""
        top = Qcow2Image(BytesReadable("top", content))
        names = [path.name for path in self.paths]
        named = top.header.backing_name
        below = self.below()[: names.index(named) + 1] if named is not None else []
        return GuestView(tuple(layer_of_qcow2(one, one.readable) for one in (*below, top)))


def build(directory: Path, scenario: Scenario) -> Built:
    paths: list[Path] = []
    plans = [
        ("root", scenario.root, 2 * MIB, {}),
        ("base", scenario.base, 2 * MIB, scenario.base_options),
        ("middle", scenario.middle, 2 * MIB, {}),
        ("top", scenario.top, scenario.top_size, scenario.top_options),
    ]
    for name, writes, size, options in plans:
        if writes is None:
            continue
        backing = paths[-1].name if paths else None
        path = qemu.create(directory / f"{name}.qcow2", size, backing=backing, **options)
        if scenario.snapshot and name == "top":
            qemu.qemu_io(path, "write -P 9 300k 1k")
            qemu.qemu_img("snapshot", "-c", "before", path)
        qemu.qemu_io(path, *writes)
        paths.append(path)
    bits = BitSet.from_ranges([(0, 5 * KIB), (MIB, 100)], scenario.top_size, 512)
    holds = scenario.top_options.get("compat") != "0.10"
    return Built(
        paths=tuple(paths),
        base=0 if scenario.root is None else 1,
        expected=qemu.content(paths[-1]),
        top=paths[-1].read_bytes(),
        bitmaps=(StoredBitmap("kept", bits, BitmapFlag.AUTO),) if holds else (),
    )


def prepared(built: Built, port: RecordingPort) -> Commit:
    image = Qcow2Image(port)
    layers = [layer_of_qcow2(one, one.readable) for one in built.below()]
    chain = GuestView((*layers, layer_of_qcow2(image, port)))
    below = chain.layers[: built.base]
    disk = MappedDisk(
        header=image.header,
        size_after=image.header.virtual_size,
        backing_end=below[-1].virtual_size if below else 0,
        direction=Direction.PULL,
    )
    merged = merged_layers(chain, built.base, Direction.PULL)
    need = survey_mapping(image, disk, merged)[Placement.COW]
    return Commit(
        image=image,
        chain=chain,
        base_index=built.base,
        tree=new_tree(image.name, disk, need, built.bitmaps or None),
        zeroes=None,
        backing=built.backing,
        placement=Placement.COW,
        shares_extents=False,
    )


def pull(built: Built, port: RecordingPort) -> None:
    job = prepared(built, port)

    def before_switch(image: Qcow2Image, merged: GuestView) -> None:
        verify_soundness(image)
        verify_bitmaps(image, built.bitmaps)
        verify_content("top", merged, job.chain, lambda _done: None, lambda: False)

    transfer = transfer_into(
        port,
        on_progress=lambda _done: None,
        should_stop=lambda: False,
        bandwidth=None,
        read_back=ReadBack.COMPARED,
    )
    commit_natively(port, job, transfer, before_switch)
    transfer.close()


def assert_pulled(built: Built, content: bytes, path: Path) -> None:
    image = Qcow2Image(BytesReadable("top", content))
    assert image.header.backing_name == built.backing.name
    assert image.header.backing_format == built.backing.format
    path.write_bytes(content)
    qemu.assert_clean(path)
    assert qemu.content(path) == built.expected
    assert trusted_bitmaps(content).keys() == {bitmap.name for bitmap in built.bitmaps}


@pytest.mark.parametrize("device", [False, True], ids=["file", "device"])
@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_every_crash_leaves_the_guest_its_disk(
    tmp_path: Path, scenario: Scenario, device: bool
) -> None:
    built = build(tmp_path, scenario)
    start = built.top
    if device:
        start += random.Random(1).randbytes(4 * MIB)
    port = RecordingPort(start, is_block_device=device)
    pull(built, port)
    assert_pulled(built, bytes(port.content), built.paths[-1])
    old = Qcow2Image(BytesReadable("top", built.top)).header.backing_name
    seen = set()
    for number, state in enumerate(crash_states(start, port.log, seed=5, samples=SAMPLES)):
        image = Qcow2Image(BytesReadable("top", state.content))
        assert check(image).sound, state.label
        view = built.view(state.content)
        assert view.read(0, view.virtual_size) == built.expected, state.label
        named = image.header.backing_name
        switched = named == built.backing.name
        assert switched or named == old, state.label
        names = trusted_bitmaps(state.content).keys()
        assert names == ({bitmap.name for bitmap in built.bitmaps} if switched else set())
        seen.add(switched)
        if not switched and number % RERUN_SAMPLE == 0:
            again = RecordingPort(state.content, is_block_device=device)
            reclaim_leaks(again)
            pull(built, again)
            assert_pulled(built, bytes(again.content), built.paths[-1])
    assert seen == {False, True}


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_the_planned_size_is_enough_and_one_cluster_less_is_not(
    tmp_path: Path, scenario: Scenario
) -> None:
    built = build(tmp_path, scenario)
    job = prepared(built, RecordingPort(built.top))
    cluster_size = job.disk.header.cluster_size
    end = place_tree(job.tree, stored_free_space(job.image)).allocation.end * cluster_size
    exact = RecordingPort(built.top.ljust(end, b"\xaa"), is_block_device=True)
    if len(built.top) <= end:
        pull(built, exact)
        assert_pulled(built, bytes(exact.content), built.paths[-1])
    if len(built.top) <= end - cluster_size:
        content = built.top.ljust(end - cluster_size, b"\xaa")
        short = RecordingPort(content, is_block_device=True)
        with pytest.raises(NotEnoughSpace):
            pull(built, short)
        assert not [event for event in short.log if isinstance(event, Written)]
