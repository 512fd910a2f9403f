# SPDX-License-Identifier: Apache-2.0
"""Every call of the operating system fails once, in merges and other operations of all kinds.

However it ends: the guest reads what it read, checkpoints are whole, nothing is gone that should
be there, the error is one of ours, and the same command finishes the job once all is well.
"""

from __future__ import annotations

import contextlib
import errno
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from msgspec import Struct
from msgspec.structs import replace

import chainmerge
from chainmerge.bitmaps.rules import BitmapState
from chainmerge.bitmaps.stored import state_of
from chainmerge.chain.names import backing_path
from chainmerge.errors import ExitCode
from chainmerge.options import Access, MergeOptions
from chainmerge.qcow2.bitmaps import read_bits, read_directory
from chainmerge.qcow2.bits import BitSet
from chainmerge.qcow2.check import check_with_references
from chainmerge.qcow2.header import MAGIC
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.records.files import STATE_DIRECTORY
from chainmerge.storage.files import FileReadable
from tests.conftest import SOAK
from tests.support.faults import Fault, Lost, Run, faults_of, run_with
from tests.support.images import KIB, Write, WriteCompressed, WriteZeroes, apply_writes, open_qcow2
from tests.support.loopdev import loop_device
from tests.support.qemu import check, content, create, qemu_img

DISK: Final = 1024 * KIB
DEVICE: Final = 4096 * KIB
CHOSEN: Final = 2
"""Faults of each operation, where not all of them are tried."""
NO_WAITING: Final = Access(lock_wait=0, allow_backing=("/dev",))

ImageWrite = Write | WriteZeroes | WriteCompressed
Checkpoints = dict[str, BitSet]


class Images(Struct, frozen=True):
    """A chain ``base <- middle <- top <- leaf``; *device* is a block device that base is on."""

    directory: Path
    device: Path | None = None

    @property
    def base(self) -> Path:
        return self.device or self.directory / "base"

    @property
    def middle(self) -> Path:
        return self.directory / "middle"

    @property
    def top(self) -> Path:
        return self.directory / "top"

    @property
    def leaf(self) -> Path:
        return self.directory / "leaf"

    def snapshot(self) -> dict[str, bytes]:
        files = {path.name: path.read_bytes() for path in self.directory.iterdir()}
        if self.device is not None:
            files["device"] = self.device.read_bytes()
        return files


class Operation(Struct, frozen=True):
    """What is done to the images; *gone* are those that are not there in the end.

    *base* is what the base of the chain is: a file, a block device or a raw file. *may_leak*:
    where the old set could not be released the rerun finds nothing to do, and says so; what is
    left is for repair.
    """

    run: Callable[[Images], object]
    gone: frozenset[str] = frozenset()
    base: str = "file"
    may_leak: bool = False


def _merge(top: str, base: str | None = None, **options: object) -> Callable[[Images], object]:
    def run(images: Images) -> object:
        below = None if base is None else getattr(images, base)
        chosen = replace(MergeOptions(), **options)
        return chainmerge.merge(getattr(images, top), below, NO_WAITING, chosen)

    return run


def _prune(images: Images) -> object:
    return chainmerge.prune(images.top, access=NO_WAITING)


def _unite(images: Images) -> object:
    return chainmerge.bitmaps_merge(images.leaf, "all", ("new",), access=NO_WAITING)


OPERATIONS: Final[dict[str, Operation]] = {
    "new clusters": Operation(_merge("top", data="cow")),
    "in place": Operation(_merge("top", data="in-place")),
    "a range": Operation(_merge("top", "base")),
    "the lowest": Operation(_merge("middle", data="cow", detect_zeroes=True)),
    "delete": Operation(_merge("top", "base", delete=True), frozenset({"middle", "top"})),
    "keep the name": Operation(
        _merge("top", keep_name=True, direction="commit"), frozenset({"middle"})
    ),
    "keep the name of a range": Operation(
        _merge("top", "base", keep_name=True, delete=True, direction="commit"),
        frozenset({"base", "middle"}),
    ),
    "pull": Operation(_merge("top", direction="pull")),
    "pull and delete": Operation(
        _merge("top", "middle", direction="pull", delete=True), frozenset({"middle"})
    ),
    "by QEMU": Operation(_merge("top", engine="qemu")),
    "by QEMU, a range, delete": Operation(
        _merge("top", "base", engine="qemu", delete=True), frozenset({"middle", "top"})
    ),
    "device": Operation(_merge("middle"), base="device"),
    "device, in place, delete": Operation(
        _merge("middle", data="in-place", delete=True), frozenset({"middle"}), base="device"
    ),
    "raw": Operation(_merge("middle"), base="raw"),
    "raw, delete": Operation(_merge("middle", delete=True), frozenset({"middle"}), base="raw"),
    "prune": Operation(_prune, may_leak=True),
    "unite bitmaps": Operation(_unite, may_leak=True),
}


def _state_files() -> frozenset[Path]:
    """What is kept of block devices; it stays from one test to the next."""
    return frozenset(STATE_DIRECTORY.glob("*.chainmerge-*"))


class Stage:
    """Where an operation is done over and over, each time on the same images."""

    def __init__(self, images: Images, operation: Operation) -> None:
        self.images = images
        self.operation = operation
        self._sound = images.snapshot()
        self._kept_before = _state_files()
        self.content = content(images.leaf)
        self.checkpoints = checkpoints_of(images.leaf)

    def set(self) -> None:
        """Have the images as they were built."""
        for path in self.images.directory.iterdir():
            if path.name not in self._sound:
                path.unlink()
        for left in _state_files() - self._kept_before:
            left.unlink()
        for name, data in self._sound.items():
            if name == "device":
                assert self.images.device is not None
                self.images.device.write_bytes(data)
            else:
                (self.images.directory / name).write_bytes(data)

    def run(self, fault: Fault | None, lost: Lost | None = None) -> Run:
        places = [self.images.directory, STATE_DIRECTORY]
        if self.images.device is not None:
            places.append(self.images.device)
        return run_with(fault, places, lambda: self.operation.run(self.images), lost)

    def is_untouched(self) -> bool:
        return self.images.snapshot() == self._sound

    def means_the_same(self) -> bool:
        """Whether only what nothing refers to is another: free clusters, given back to the disk."""
        now = self.images.snapshot()
        return now.keys() == self._sound.keys() and all(
            now[name] == data or _same_where_used(data, now[name])
            for name, data in self._sound.items()
        )

    def assert_nothing_lost(self) -> None:
        """After whatever happened.

        A checkpoint may seem broken in between, where base has taken it over and an image that
        stands on base for a moment longer lacks it. It must not seem whole with bits missing.
        """
        names = {path.name for path in self.images.directory.iterdir()}
        assert self._sound.keys() - names - {"device"} <= self.operation.gone
        assert content(self.images.leaf) == self.content
        for name, bits in checkpoints_of(self.images.leaf).items():
            assert covers(bits, self.checkpoints[name]), name
        assert all(report["corruptions"] == 0 for report in self._checks())

    def assert_done(self) -> None:
        """After the operation has come to its end."""
        names = {path.name for path in self.images.directory.iterdir()}
        assert not names & self.operation.gone
        assert not [name for name in names - self._sound.keys() if not name.endswith("-merged")]
        assert content(self.images.leaf) == self.content
        found = checkpoints_of(self.images.leaf)
        assert found.keys() == self.checkpoints.keys()
        assert all(covers(found[name], bits) for name, bits in self.checkpoints.items())
        reports = list(self._checks())
        assert all(report["corruptions"] == 0 for report in reports), reports
        assert self.operation.may_leak or all(report["leaks"] == 0 for report in reports), reports

    def _checks(self) -> Iterator[dict[str, Any]]:
        return (check(image) for image in chain_of(self.images.leaf) if is_qcow2(image))


def is_qcow2(image: Path) -> bool:
    with FileReadable(image) as readable:
        return readable.read(0, 4) == b"QFI\xfb"


def chain_of(leaf: Path) -> list[Path]:
    """The image and those below it, by their headers."""
    images = [leaf]
    while is_qcow2(images[-1]):
        assert len(images) < 100, f"the chain of {leaf} has no end: {images[:4]}"
        with FileReadable(images[-1]) as readable:
            name = Qcow2Image(readable).header.backing_name
        if name is None:
            break
        images.append(backing_path(images[-1], name))
    return images


def checkpoints_of(leaf: Path) -> Checkpoints:
    """The checkpoints that pass the chain test, with all that was written since."""
    passing: Checkpoints = {}
    open_names: set[str] | None = None
    dead: set[str] = set()
    for image in chain_of(leaf):
        stored = _bitmaps_of(image)
        if open_names is None:
            open_names = {name for name, bits in stored.items() if bits is not None}
            passing = {name: stored[name] for name in open_names}  # type: ignore[misc]
            continue
        for name in list(passing):
            if name not in stored:
                open_names.discard(name)
            elif name not in open_names or stored[name] is None:
                # A gap, or an occurrence that is not valid.
                dead.add(name)
            else:
                bits = stored[name]
                assert bits is not None
                passing[name] = _united(passing[name], bits)
    return {name: bits for name, bits in passing.items() if name not in dead}


def _bitmaps_of(image: Path) -> dict[str, BitSet | None]:
    if not is_qcow2(image):
        return {}
    with FileReadable(image) as readable:
        opened = Qcow2Image(readable)
        return {
            entry.name: read_bits(opened, entry)
            if state_of(opened, entry) is BitmapState.VALID
            else None
            for entry in read_directory(opened)
        }


def _united(one: BitSet, other: BitSet) -> BitSet:
    finest = min(one.granularity, other.granularity)
    # An overlay can be larger than what it stands on.
    size = max(one.disk_size, other.disk_size)
    return one.with_geometry(size, finest).union(other.with_geometry(size, finest))


def covers(found: BitSet, wanted: BitSet) -> bool:
    return _united(found, wanted) == found.with_granularity(
        min(found.granularity, wanted.granularity)
    )


def build(directory: Path, base: str) -> Images:
    """Data, zeros, compressed clusters and checkpoints; each image hides a part of those below."""
    directory.mkdir()
    images = Images(directory)
    kind = "raw" if base == "raw" else "qcow2"
    options = () if kind == "raw" else ("-o", f"cluster_size={4 * KIB}")
    qemu_img("create", "-q", "-f", kind, *options, images.base, str(DISK))
    below: Path = images.base
    for number, path in enumerate((images.base, images.middle, images.top, images.leaf)):
        if number:
            create(
                path,
                backing=below.name,
                backing_format=kind if number == 1 else "qcow2",
                cluster_size=(4, 4, 16, 64)[number] * KIB,
            )
        if kind == "qcow2":
            for name in ("all", "stale" if number == 0 else "new" if number > 1 else "few"):
                qemu_img("bitmap", "--add", "-g", "4096", path, name)
        start = number * 128 * KIB
        writes: list[ImageWrite] = [
            WriteCompressed(start + 256 * KIB, 64 * KIB, 5),
            Write(start, 96 * KIB, number + 1),
            WriteZeroes(start + 64 * KIB, 32 * KIB),
            Write(900 * KIB, 5 * KIB, number + 2),
        ]
        fmt = kind if number == 0 else "qcow2"
        apply_writes(path, writes[fmt == "raw" :], fmt=fmt)
        below = path
    for pattern in directory.glob("pattern-*"):
        pattern.unlink()
    return images


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of images whose base is so, built once."""
    place = tmp_path_factory.mktemp("templates")

    def of(base: str) -> Path:
        if not (place / base).exists():
            build(place / base, base)
        return place / base

    return of


@contextlib.contextmanager
def set_up(
    directory: Path, operation: Operation, template: Callable[[str], Path]
) -> Iterator[Stage]:
    """The operation's images, in a directory of their own."""
    images = Images(directory / "images")
    shutil.copytree(template("raw" if operation.base == "raw" else "file"), images.directory)
    if operation.base != "device":
        yield Stage(images, operation)
        return
    with loop_device(directory / "device-backing", DEVICE) as device:
        device.write_bytes(images.base.read_bytes())
        images.base.unlink()
        qemu_img("rebase", "-u", "-F", "qcow2", "-b", device, images.middle)
        yield Stage(replace(images, device=device), operation)


def chosen(faults: Sequence[Fault], name: str) -> list[Fault]:
    """All of them in a soak, else a few, each of another function; the same ones each time."""
    if SOAK:
        return list(faults)
    chance = random.Random(name)
    functions = sorted({fault.function for fault in faults})
    picked = chance.sample(functions, min(CHOSEN, len(functions)))
    return [chance.choice([one for one in faults if one.function == each]) for each in picked]


@pytest.mark.timeout(0 if SOAK else 300)
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_call_fails_once(
    tmp_path: Path,
    name: str,
    template: Callable[[str], Path],
    record_property: Callable[[str, object], None],
) -> None:
    count: Counter[str] = Counter()
    with set_up(tmp_path, OPERATIONS[name], template) as stage:
        # In this process, so that no child has to import what only a merge needs.
        stage.operation.run(stage.images)
        stage.set()
        sound = stage.run(None)
        assert (sound.error, sound.bug) == ("", "")
        stage.assert_done()
        faults = faults_of(sound.calls)
        for fault in chosen(faults, name):
            with _naming(fault):
                count += judge(stage, fault)
    record_property("faults", dict(count))
    print(f"{name}: {len(faults)} faults, {dict(count)}")
    assert count["injected"]


@pytest.mark.parametrize("name", ["a range", "by QEMU", "by QEMU, a range, delete"])
def test_a_disk_that_is_full_at_any_reservation(
    tmp_path: Path, name: str, template: Callable[[str], Path]
) -> None:
    """Refused before the first change, with nothing left beside base; unfinished after it."""
    count: Counter[str] = Counter()
    with set_up(tmp_path, OPERATIONS[name], template) as stage:
        for number in range(stage.run(None).calls["fallocate"]):
            fault = Fault("fallocate", number, errno.ENOSPC)
            with _naming(fault):
                count += judge(stage, fault)
    assert count["failed"]


@pytest.mark.parametrize("name", ["delete", "raw, delete"])
def test_no_rerun_believes_what_a_flush_has_lost(
    tmp_path: Path, name: str, template: Callable[[str], Path]
) -> None:
    """The page cache shows a merge that the disk does not have; top must not be deleted for it."""
    with set_up(tmp_path, OPERATIONS[name], template) as stage:
        flushes = stage.run(None).calls["fdatasync"]
        lost = 0
        for number in range(flushes):
            fault = Fault("fdatasync", number, errno.EIO)
            with _naming(fault):
                lost += _judge_once(stage, fault, at_once=False)["lost"]
    assert lost


@contextlib.contextmanager
def _naming(fault: Fault) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        error.add_note(f"fault: {fault}")
        raise


def _same_where_used(before: bytes, after: bytes) -> bool:
    if len(before) != len(after) or not before.startswith(MAGIC):
        return False
    with tempfile.NamedTemporaryFile() as file:
        file.write(before)
        file.flush()
        image = open_qcow2(Path(file.name))
        _, references = check_with_references(image)
        size = image.header.cluster_size
    used = np.flatnonzero(references.counts).tolist()
    return all(before[at * size :][:size] == after[at * size :][:size] for at in used)


def judge(stage: Stage, fault: Fault) -> Counter[str]:
    """One fault, the state after it, and the rerun."""
    count: Counter[str] = Counter()
    # What a flush has lost shows either before the rerun or only after it.
    for at_once in (False, True) if fault.function.endswith("sync") else (False,):
        count += _judge_once(stage, fault, at_once)
    return count


def _judge_once(stage: Stage, fault: Fault, at_once: bool) -> Counter[str]:
    stage.set()
    run = stage.run(fault)
    if at_once:
        run.lost.drop()
    assert not run.bug, run.bug
    assert not run.error or run.exit_code in (
        ExitCode.FAILED,
        ExitCode.REFUSED,
        ExitCode.UNKNOWN,
    )
    count = Counter(injected=run.injected, failed=bool(run.error), lost=bool(run.lost.pages))
    if run.error and not run.lost.pages and stage.is_untouched():
        return count
    if run.exit_code == ExitCode.REFUSED:
        assert stage.means_the_same(), f"refused, but changed: {run.error}"
    stage.assert_nothing_lost()
    again = stage.run(None, run.lost)
    assert (again.error, again.bug) == ("", ""), f"after {run.error}"
    again.lost.drop()
    stage.assert_done()
    return count
