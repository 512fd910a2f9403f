# SPDX-License-Identifier: Apache-2.0
"""Images that are reached by what the caller allows or declares: read back by who was told nothing.

What is asked for says where images may lie, in which formats, with which data files. A merge
that has taken effect reads base back, and a process that carries it on has none of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chainmerge import live
from chainmerge.documents.progress import Stage
from chainmerge.live.errors import LiveUnsuited
from chainmerge.merging.errors import MergeUnfinished
from chainmerge.options import Access, LiveOptions
from chainmerge.qcow2.features import ExtensionType
from chainmerge.records.saved_bitmaps import saved_bitmaps_file
from tests.support.domain_vm import running_domain
from tests.support.live_scenario import DISK
from tests.support.live_vm import one_drive, running_vm
from tests.support.qemu import content, create, info, qemu_img, qemu_io
from tests.support.surgery import extension_at, put_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from chainmerge.documents.progress import ProgressEvent

pytestmark = pytest.mark.timeout(120)


@dataclass(frozen=True)
class Reached:
    """A chain, root first, and what has to be said for it to be found."""

    images: tuple[Path, ...]
    base: Path
    access: Access

    @property
    def top(self) -> Path:
        return self.images[-2]


def with_data_file(directory: Path, *, raw: bool) -> Reached:
    data = directory / "data.img"
    data.touch()
    base = create(
        directory / "base.qcow2", DISK, data_file=str(data), data_file_raw="on" if raw else "off"
    )
    return _finished((base,), base, Access(allow_data_file=(str(data),)))


def raw_data_file(directory: Path) -> Reached:
    """Base's data is in a file of its own, which is the guest's disk."""
    return with_data_file(directory, raw=True)


def data_file(directory: Path) -> Reached:
    """Base's data is in a file of its own, which only base makes sense of."""
    return with_data_file(directory, raw=False)


def data_file_of_the_root(directory: Path) -> Reached:
    """An image that the merge only reads through has a data file."""
    found = with_data_file(directory / "below", raw=True)
    root = found.images[0]
    base = create(directory / "base.qcow2", backing=root)
    access = Access(allow_data_file=found.access.allow_data_file, allow_backing=(str(root.parent),))
    return _finished((root, base), base, access)


def another_directory(directory: Path) -> Reached:
    """The root lies where backing files may lie only if that is said."""
    elsewhere = directory / "templates"
    elsewhere.mkdir()
    root = create(elsewhere / "root.qcow2", DISK)
    qemu_io(root, "write -q -P 5 0 1M")
    base = create(directory / "base.qcow2", backing=root)
    return _finished((root, base), base, Access(allow_backing=(str(elsewhere),)))


def symbolic_link(directory: Path) -> Reached:
    """The same, and the header leads there by another directory, which is a link."""
    elsewhere, link = directory / "templates", directory / "link"
    elsewhere.mkdir()
    link.symlink_to(elsewhere)
    root = create(elsewhere / "root.qcow2", DISK)
    base = create(directory / "base.qcow2", backing=link / root.name)
    return _finished((root, base), base, Access(allow_backing=(str(link), str(elsewhere))))


def declared_format(directory: Path) -> Reached:
    """No header tells the format of a raw root."""
    root = create(directory / "root.raw", DISK, fmt="raw")
    qemu_io(root, "write -q -P 5 0 1M", fmt="raw")
    base = create(directory / "base.qcow2", backing=root, backing_format="raw")
    # An extension of a type that nobody knows is passed over.
    put_bytes(base, extension_at(base, ExtensionType.BACKING_FORMAT) - 8, b"\x12\x34\x56\x78")
    return _finished((root, base), base, Access(formats={str(root): "raw"}))


def _finished(lower: tuple[Path, ...], base: Path, access: Access) -> Reached:
    qemu_io(base, "write -q -P 1 0 4M")
    top = create(base.parent / "top.qcow2", backing=base)
    qemu_io(top, "write -q -P 2 2M 4M")
    leaf = create(base.parent / "leaf.qcow2", backing=top)
    for image in (base, top, leaf):
        qemu_img("bitmap", "--add", image, "checkpoint")
    return Reached((*lower, top, leaf), base, access)


WAYS: tuple[Callable[[Path], Reached], ...] = (
    raw_data_file,
    data_file,
    data_file_of_the_root,
    another_directory,
    symbolic_link,
    declared_format,
)
# libvirt itself opens no backing file of which nobody tells the format, and changes no bitmaps of
# an image whose data is in another file.
UNSUITED = (raw_data_file, data_file)
WAYS_OF_LIBVIRT = tuple(way for way in WAYS if way not in (*UNSUITED, declared_format))


class Gone(Exception):
    """The process is: nothing of ours expects it."""


def gone_at(stage: Stage) -> Callable[[ProgressEvent], None]:
    def on_progress(event: ProgressEvent) -> None:
        if event.stage is stage:
            raise Gone

    return on_progress


def merge_and_carry_on(disk: live.LiveDisk, reached: Reached) -> None:
    """Merge, end before anything is read back, and let another process do the rest."""
    with pytest.raises(Gone):
        live.merge(
            disk,
            reached.top,
            reached.base,
            reached.access,
            LiveOptions(delete=True),
            on_progress=gone_at(Stage.VERIFY),
        )
    report = live.resume(disk)
    assert report.deleted == (str(reached.top),)


def assert_merged(reached: Reached, before: bytes) -> None:
    leaf = reached.images[-1]
    assert info(leaf)["full-backing-filename"] == str(reached.base)
    assert content(leaf) == before
    assert not [file.name for file in reached.base.parent.iterdir() if "-live" in file.name]


@pytest.mark.parametrize("way", WAYS)
def test_by_qmp(tmp_path: Path, way: Callable[[Path], Reached]) -> None:
    (tmp_path / "chain" / "below").mkdir(parents=True)
    reached = way(tmp_path / "chain")
    before = content(reached.images[-1])
    with running_vm(tmp_path / "vm", reached.images, one_drive) as vm:
        with vm.disk() as disk:
            merge_and_carry_on(disk, reached)
        vm.quit()
    assert_merged(reached, before)


@pytest.mark.parametrize("way", WAYS_OF_LIBVIRT)
def test_by_libvirt(tmp_path: Path, uri: str, way: Callable[[Path], Reached]) -> None:
    (tmp_path / "chain" / "below").mkdir(parents=True)
    reached = way(tmp_path / "chain")
    before = content(reached.images[-1])
    with running_domain(tmp_path / "vm", uri, reached.images) as vm:
        with vm.disk() as disk:
            merge_and_carry_on(disk, reached)
        vm.quit()
    assert_merged(reached, before)


def test_what_would_be_a_refusal_is_none_once_the_merge_has_begun(tmp_path: Path) -> None:
    """Status 3 says that nothing was changed."""
    (tmp_path / "chain" / "below").mkdir(parents=True)
    reached = another_directory(tmp_path / "chain")
    saved = saved_bitmaps_file(reached.base)

    def damage(event: ProgressEvent) -> None:
        if event.stage is Stage.VERIFY and saved.exists():
            saved.write_text("{}", encoding="ascii")

    with running_vm(tmp_path / "vm", reached.images, one_drive) as vm, vm.disk() as disk:
        with pytest.raises(MergeUnfinished) as unfinished:
            live.merge(disk, reached.top, None, reached.access, on_progress=damage)
        assert unfinished.value.exit_code == 1
        saved.unlink()
        live.resume(disk)
    assert info(reached.images[-1])["full-backing-filename"] == str(reached.base)


@pytest.mark.parametrize("way", UNSUITED)
def test_bitmaps_that_libvirt_cannot_change_refuse(
    tmp_path: Path, uri: str, way: Callable[[Path], Reached]
) -> None:
    (tmp_path / "chain").mkdir()
    reached = way(tmp_path / "chain")
    before = content(reached.images[-1])
    with running_domain(tmp_path / "vm", uri, reached.images) as vm:
        with vm.disk() as disk, pytest.raises(LiveUnsuited):
            live.merge(disk, reached.top, reached.base, reached.access)
        vm.quit()
    assert content(reached.images[-1]) == before
    assert not [file for file in reached.base.parent.iterdir() if "chainmerge" in file.name]
