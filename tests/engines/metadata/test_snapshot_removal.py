# SPDX-License-Identifier: Apache-2.0
"""Snapshots taken out of an image's table: what stays shows what it showed, and nothing is left."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from chainmerge.chain.layers import layer_of_qcow2
from chainmerge.chain.view import GuestView
from chainmerge.engines.metadata.errors import RewriteFailed
from chainmerge.engines.metadata.snapshot_removal import remove_snapshots
from chainmerge.qcow2.check import check
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.readable import BytesReadable
from chainmerge.qcow2.snapshots import image_of_snapshot, read_snapshots
from chainmerge.storage.files import WritablePort
from tests.support import qemu
from tests.support.crash import FailingPort, RecordingPort, crash_states
from tests.support.images import Discard, Geometry, apply_writes, geometries, operations

KIB = 1 << 10
MIB = 1 << 20


def by_qemu(image: Path, snapshot: str) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "raw"
        qemu.qemu_img("convert", "-U", "-l", snapshot, "-O", "raw", image, raw)
        return raw.read_bytes()


def views_of(content: bytes) -> tuple[bytes, dict[str, bytes]]:
    """What an image without a backing file shows, and what its snapshots show, read by us."""
    readable = BytesReadable("image", content)
    image = Qcow2Image(readable)

    def whole(one: Qcow2Image) -> bytes:
        view = GuestView((layer_of_qcow2(one, readable),))
        return view.read(0, view.virtual_size)

    snapshots = {one.name: whole(image_of_snapshot(image, one)) for one in read_snapshots(image)}
    return whole(image), snapshots


@st.composite
def histories(draw: st.DrawFn) -> tuple[Geometry, int, list[object]]:
    """What is done to an image: writes, and the numbers of snapshots that are taken."""
    geometry = draw(geometries())
    if geometry.refcount_bits < 16:
        geometry = Geometry(geometry.cluster_size, geometry.extended_l2, 16)
    size = draw(st.integers(1, min(MIB, geometry.max_disk) // 512)) * 512
    steps: list[object] = []
    for number in range(draw(st.integers(1, 4))):
        written = draw(operations(geometry, size, max_size=3))
        # Compressed data goes to fresh images only.
        steps += [one for one in written if number == 0 or "Compressed" not in str(type(one))]
        steps.append(number)
    written = draw(operations(geometry, size, max_size=3))
    return geometry, size, [*steps, *(one for one in written if "Compressed" not in str(type(one)))]


def build(image: Path, geometry: Geometry, size: int, steps: list[object]) -> list[str]:
    qemu.create(image, size, backing=None, backing_format="", fmt="qcow2", **geometry.options)
    names = []
    for step in steps:
        if isinstance(step, int):
            names.append(f"n{step}" + "x" * (step * 7))
            qemu.qemu_img("snapshot", "-c", names[-1], image)
        else:
            options = ("--discard", "unmap") if isinstance(step, Discard) else ()
            apply_writes(image, [step], options=options)  # type: ignore[list-item]
    return names


@settings(max_examples=40)
@given(histories(), st.data())
def test_what_stays_is_what_it_was(
    history: tuple[Geometry, int, list[object]], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        image = Path(scratch) / "image.qcow2"
        names = build(image, *history)
        going = data.draw(st.sets(st.sampled_from(range(len(names))), min_size=1))
        before = {name: by_qemu(image, name) for name in names}
        active = qemu.content(image)
        note(f"{names}, {going} go")
        with WritablePort(image) as port:
            remove_snapshots(port, going)
        qemu.assert_clean(image)
        with WritablePort(image) as port:
            assert check(Qcow2Image(port)).clean
        assert qemu.content(image) == active
        listed = [one["name"] for one in qemu.info(image).get("snapshots", [])]
        assert listed == [name for at, name in enumerate(names) if at not in going]
        assert {name: by_qemu(image, name) for name in listed} == {
            name: before[name] for name in listed
        }
        # QEMU can go on writing to it.
        qemu.qemu_io(image, f"write -q -P 7 0 {min(history[1], 4096)}")
        qemu.assert_clean(image)
        assert {name: by_qemu(image, name) for name in listed} == {
            name: before[name] for name in listed
        }


def busy_image(directory: Path) -> Path:
    image = qemu.create(directory / "image.qcow2", MIB, cluster_size=512)
    qemu.qemu_io(image, "write -q -P 1 0 300k")
    qemu.qemu_img("snapshot", "-c", "stays", image)
    qemu.qemu_io(image, "write -q -P 2 100k 300k")
    qemu.qemu_img("snapshot", "-c", "goes", image)
    qemu.qemu_io(image, "write -q -P 3 350k 100k")
    return image


@pytest.mark.parametrize("going", [{1}, {0}, {0, 1}])
def test_a_crash_leaves_all_or_nothing_and_no_leak(tmp_path: Path, going: set[int]) -> None:
    before = busy_image(tmp_path).read_bytes()
    active, snapshots = views_of(before)
    port = RecordingPort(before)
    remove_snapshots(port, going)
    left = {name: view for at, (name, view) in enumerate(snapshots.items()) if at not in going}
    outcomes = set()
    for state in crash_states(before, port.log, seed=1, samples=25):
        report = check(Qcow2Image(BytesReadable("crashed", state.content)))
        assert report.clean, (state.label, report.messages)
        shown, listed = views_of(state.content)
        assert shown == active, state.label
        assert listed in (snapshots, left), state.label
        outcomes.add(len(listed))
    assert outcomes == {len(snapshots), len(left)}


def test_where_storage_fails_before_the_switch_the_file_is_what_it_was(tmp_path: Path) -> None:
    before = busy_image(tmp_path).read_bytes()
    port = FailingPort(before, survives=1)
    with pytest.raises(RewriteFailed):
        remove_snapshots(port, {0})
    assert len(port.content) == len(before)
    assert views_of(bytes(port.content)) == views_of(before)


def test_the_space_is_given_back(tmp_path: Path) -> None:
    image = qemu.create(tmp_path / "image.qcow2", 64 * MIB)
    qemu.qemu_io(image, "write -q -P 1 0 16M")
    qemu.qemu_img("snapshot", "-c", "goes", image)
    qemu.qemu_io(image, "write -q -P 2 0 16M")
    with WritablePort(image) as port:
        freed = remove_snapshots(port, {0})
    assert freed >= 16 * MIB
    assert image.stat().st_blocks * 512 < 18 * MIB
    qemu.assert_clean(image)
