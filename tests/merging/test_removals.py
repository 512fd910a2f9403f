# SPDX-License-Identifier: Apache-2.0
"""What a merge deletes or renames: known beforehand, said, and nothing left that leads nowhere."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import chainmerge
from chainmerge.documents.merge import MergeOutcome
from chainmerge.errors import ExitCode, Refused
from chainmerge.options import Access, MergeOptions
from chainmerge.planning.errors import (
    BaseNamedByOthers,
    CannotRename,
    CannotTakeAway,
    DataFileOutOfReach,
)
from chainmerge.records.files import StateDirectoryUnusable
from chainmerge.storage.errors import ImageReadOnly
from tests.support.cli import COMMAND, environment
from tests.support.qemu import assert_clean, content, create, info, qemu_img, qemu_io

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20
AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all")
ENDS: dict[str, dict[str, Any]] = {
    "delete": {"delete": True},
    "keep-name": {"keep_name": True, "direction": "commit"},
    "both": {"delete": True, "keep_name": True, "direction": "commit"},
    "pull and delete": {"delete": True, "direction": "pull"},
}


@contextlib.contextmanager
def flagged(path: Path, flag: str) -> Iterator[None]:
    """A file or directory that the file system lets nobody change."""
    subprocess.run(["chattr", f"+{flag}", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["chattr", f"-{flag}", path], check=True)


@contextlib.contextmanager
def mounted_over(source: Path, target: Path) -> Iterator[None]:
    """The same directory or file, at another place, by a mount of its own."""
    subprocess.run(["mount", "--bind", source, target], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", target], check=True)


def killed_before_unlinking(victim: Path, work: Callable[[], object]) -> None:
    """Do some work in another process, which is killed when it is about to remove a name."""
    pid = os.fork()
    if pid == 0:
        unlink = os.unlink

        def die_at_last(path: Any, **options: Any) -> None:
            if os.fspath(path) == os.fspath(victim):
                os.kill(os.getpid(), signal.SIGKILL)
            unlink(path, **options)

        try:
            os.unlink = die_at_last
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def give_access_list(path: Path, user: int) -> None:
    """An access control list by which one more user may read and write (acl(5), version 2)."""
    nobody = 0xFFFFFFFF
    entries = ((1, 6, nobody), (2, 6, user), (4, 4, nobody), (0x10, 6, nobody), (0x20, 0, nobody))
    packed = b"".join(struct.pack("<HHI", *entry) for entry in entries)
    os.setxattr(path, "system.posix_acl_access", struct.pack("<I", 2) + packed)


def chain(directory: Path, **options: Any) -> tuple[Path, Path, Path]:
    """Base, top and a child of top, each with something of its own."""
    directory.mkdir(exist_ok=True)
    base = create(directory / "base.qcow2", 8 * MIB)
    qemu_io(base, "write -P 1 0 1M")
    top = create(directory / "top.qcow2", backing="base.qcow2", **options)
    qemu_io(top, "write -P 2 1M 1M")
    child = create(directory / "child.qcow2", backing="top.qcow2")
    qemu_io(child, "write -P 3 2M 1M")
    return base, top, child


def all_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def assert_refused(top: Path, kind: type[Refused], options: MergeOptions) -> None:
    """By plan and merge alike, with nothing changed."""
    before = all_files(top.parent)
    plan = chainmerge.plan(top, options=options)
    assert kind.code in {refusal.code for refusal in plan.refusals}, plan.refusals
    with pytest.raises(kind):
        chainmerge.merge(top, options=options)
    assert all_files(top.parent) == before


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("flag", ["i", "a"])
@pytest.mark.parametrize("what", ["file", "directory"])
def test_what_cannot_be_deleted_is_known_beforehand(
    tmp_path: Path, end: str, flag: str, what: str
) -> None:
    base, top, _child = chain(tmp_path / "images")
    # What goes: the one that is not written to.
    doomed = base if end.startswith("pull") else top
    options = MergeOptions(**ENDS[end])
    with flagged(doomed if what == "file" else doomed.parent, flag):
        # Such a directory does not even take a record.
        closed = (what, flag) == ("directory", "i")
        assert_refused(top, StateDirectoryUnusable if closed else CannotTakeAway, options)
    report = chainmerge.merge(top, options=options)
    assert report.outcome is MergeOutcome.MERGED


@pytest.mark.parametrize("flag", ["i", "a"])
@pytest.mark.parametrize("end", [{}, {"delete": True}])
def test_a_child_that_cannot_be_written_to(tmp_path: Path, flag: str, end: dict[str, Any]) -> None:
    _base, top, child = chain(tmp_path / "images")
    with flagged(child, flag):
        assert_refused(top, ImageReadOnly, MergeOptions(**end))
    chainmerge.merge(top, options=MergeOptions(**end))
    assert info(child)["backing-filename"] == "base.qcow2"


@pytest.mark.parametrize("way", [{}, {"direction": "pull"}, {"engine": "qemu"}])
def test_a_directory_that_takes_no_records(tmp_path: Path, way: dict[str, Any]) -> None:
    base, top, _child = chain(tmp_path / "images")
    for image in (base, top):
        chainmerge.bitmaps_add(image, "kept")
    with flagged(top.parent, "i"):
        assert_refused(top, StateDirectoryUnusable, MergeOptions(**way))
    chainmerge.merge(top, options=MergeOptions(**way))


@pytest.mark.parametrize("mode", [0o1777, 0o555])
@pytest.mark.parametrize("option", ["--delete", "--keep-name"])
def test_who_may_write_images_and_not_remove_them(mode: int, option: str) -> None:
    """In a sticky directory, or one of somebody else's, an image can be written and stays."""
    # Not pytest's directory, which nobody else gets into.
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        _base, top, child = chain(Path(name) / "images")
        for path in top.parent.iterdir():
            path.chmod(0o666)
        top.parent.chmod(mode)
        before = all_files(top.parent)
        for command in ("plan", "merge"):
            ran = subprocess.run(
                [*AS_NOBODY, *COMMAND, command, "--direction", "commit", option, top],
                env=environment(PYTHONDONTWRITEBYTECODE="1"),
                capture_output=True,
                text=True,
                check=False,
                cwd="/",
            )
            assert ran.returncode == ExitCode.REFUSED, (ran.stdout, ran.stderr)
            assert "directory" in ran.stdout + ran.stderr
            if command == "plan":
                assert "cannot be deleted, replaced or renamed" in ran.stdout
        assert all_files(top.parent) == before
        assert child.exists()


def test_a_name_that_is_a_mount_stays(tmp_path: Path) -> None:
    _base, top, _child = chain(tmp_path / "images")
    with mounted_over(top, top):
        assert_refused(top, CannotTakeAway, MergeOptions(delete=True))


@pytest.mark.parametrize("end", ["delete", "keep-name"])
def test_top_on_a_read_only_mount(tmp_path: Path, end: str) -> None:
    """What is only read may be there, and cannot be taken away."""
    base = create(tmp_path / "base.qcow2", 8 * MIB)
    place = tmp_path / "read-only"
    place.mkdir()
    top = create(place / "top.qcow2", backing=str(base))
    qemu_io(top, "write -P 2 1M 1M")
    access, expected = Access(allow_backing=(str(tmp_path),), sole_user=True), content(top)
    options = MergeOptions(**ENDS[end])
    before = base.read_bytes()
    with mounted_over(place, place):
        subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
        plan = chainmerge.plan(top, access=access, options=options)
        refusals = {refusal.code: refusal.sentence for refusal in plan.refusals}
        assert "mounted read-only" in refusals[CannotTakeAway.code]
        with pytest.raises(Refused):
            chainmerge.merge(top, access=access, options=options)
        assert base.read_bytes() == before
        chainmerge.merge(top, access=access)
    assert content(base) == expected


def test_no_rename_from_one_mount_to_another(tmp_path: Path) -> None:
    """Also where both are of one file system."""
    store, vm = tmp_path / "store", tmp_path / "vm"
    vm.mkdir()
    base, _top, _child = chain(store)
    with mounted_over(store, vm):
        top = create(tmp_path / "top.qcow2", backing=str(vm / base.name))
        access = Access(allow_backing=(str(vm),), search=(str(vm),))
        for path in (store / "top.qcow2", store / "child.qcow2"):
            path.unlink()
        options = MergeOptions(keep_name=True, direction="commit")
        plan = chainmerge.plan(top, access=access, options=options)
        assert [refusal.code for refusal in plan.refusals] == [CannotRename.code]
        with pytest.raises(CannotRename):
            chainmerge.merge(top, access=access, options=options)


def test_a_recorded_deletion_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    """The rest of an earlier run, when the directory has come to be closed."""
    base, top, child = chain(tmp_path / "images")
    child.unlink()
    options = MergeOptions(delete=True)
    expected = content(top)
    killed_before_unlinking(top, lambda: chainmerge.merge(top, options=options))
    assert top.exists()
    with flagged(top.parent, "a"), pytest.raises(CannotTakeAway):
        chainmerge.merge(top, options=options)
    report = chainmerge.merge(top, options=options)
    assert report.outcome is MergeOutcome.ALREADY_MERGED
    assert not top.exists()
    assert content(base) == expected


@pytest.mark.parametrize("end", ["delete", "both", "keep-name"])
@pytest.mark.parametrize("links", [1, 3])
def test_links_do_not_lead_nowhere(tmp_path: Path, end: str, links: int) -> None:
    """The link by which an image was reached goes with its file, if that leaves no other."""
    base, top, child = chain(tmp_path / "images")
    child.unlink()
    expected = content(top)
    names = [tmp_path / f"link-{number}" for number in range(links)]
    for name, leads_to in zip(names, [*names[1:], top], strict=True):
        name.symlink_to(leads_to)
    options = MergeOptions(**ENDS[end])
    access = Access(allow_backing=(str(base.parent),))
    # A relative backing name counts from where the image was reached.
    qemu_img("rebase", "-u", "-F", "qcow2", "-b", str(base), top)
    plan = chainmerge.plan(names[0], access=access, options=options)
    report = chainmerge.merge(names[0], access=access, options=options)
    gone = {str(name) for name in names} | {str(top)} if end == "delete" else set()
    assert set(plan.delete) == set(report.deleted) == gone
    assert not [name for name in tmp_path.iterdir() if name.is_symlink() and not name.exists()]
    result = base if end == "delete" else names[0]
    assert content(result) == expected
    # By each of the names that there were.
    for name in (*names, top):
        again = chainmerge.merge(name, access=access, options=options)
        assert again.outcome is MergeOutcome.ALREADY_MERGED


def test_base_finds_its_backing_file_by_every_name_of_top(tmp_path: Path) -> None:
    """A relative name counts from where an image was reached, and that is a link elsewhere."""
    store, vm = tmp_path / "store", tmp_path / "vm"
    store.mkdir()
    vm.mkdir()
    root = create(store / "root.qcow2", 8 * MIB)
    qemu_io(root, "write -P 1 0 1M")
    base = create(store / "base.qcow2", backing="root.qcow2")
    top = create(store / "top.qcow2", backing=str(base))
    qemu_io(top, "write -P 2 1M 1M")
    link = vm / "disk.qcow2"
    link.symlink_to(top)
    expected = content(link)
    access = Access(allow_backing=(str(store),))
    options = MergeOptions(keep_name=True, direction="commit")
    chainmerge.merge(link, access=access, options=options)
    assert content(link) == content(top) == expected


@pytest.mark.parametrize("end", ["keep-name", "pull and delete"])
def test_a_link_to_base_does_not_lead_nowhere(tmp_path: Path, end: str) -> None:
    base, top, _child = chain(tmp_path / "images")
    link = tmp_path / "images" / "link-to-base"
    link.symlink_to(base.name)
    qemu_img("rebase", "-u", "-F", "qcow2", "-b", link.name, top)
    expected = content(top)
    options = MergeOptions(**ENDS[end])
    plan = chainmerge.plan(top, options=options)
    report = chainmerge.merge(top, base=link, options=options)
    assert str(link) in report.deleted
    assert plan.delete == report.deleted
    assert not link.is_symlink()
    assert not base.exists()
    assert content(top) == expected
    for name in (None, link, base):
        again = chainmerge.merge(top, base=name, options=options)
        assert again.outcome is MergeOutcome.ALREADY_MERGED


def test_a_link_that_leads_elsewhere_by_then_stays(tmp_path: Path) -> None:
    base, top, child = chain(tmp_path / "images")
    child.unlink()
    link = tmp_path / "images" / "link"
    link.symlink_to(top.name)
    options = MergeOptions(delete=True)
    killed_before_unlinking(link, lambda: chainmerge.merge(link, options=options))
    assert not top.exists()
    link.unlink()
    link.symlink_to(base.name)
    chainmerge.merge(top, options=options)
    assert link.exists()


def with_data_file(directory: Path) -> tuple[Path, Path, Path]:
    base, top, child = chain(directory)
    child.unlink()
    top.unlink()
    data = directory / "top.data"
    qemu_img(
        "create", "-q", "-f", "qcow2", "-o", f"data_file={data}", "-b", base, "-F", "qcow2", top
    )
    qemu_io(top, "write -P 5 3M 1M")
    return base, top, data


@pytest.mark.parametrize("end", ["delete", "both", "keep-name"])
def test_a_data_file_goes_with_its_image(tmp_path: Path, end: str) -> None:
    base, top, data = with_data_file(tmp_path / "images")
    expected = content(top)
    options, access = MergeOptions(**ENDS[end]), Access(allow_data_file=(str(data),))
    plan = chainmerge.plan(top, access=access, options=options)
    report = chainmerge.merge(top, access=access, options=options)
    deletes = "delete" in ENDS[end]
    assert (str(data) in plan.delete, str(data) in report.deleted) == (deletes, deletes)
    assert data.exists() != deletes
    if not deletes:
        assert any(str(data) in warning for warning in report.warnings)
    result = base if end == "delete" else top
    assert content(result) == expected
    assert_clean(result)


@pytest.mark.parametrize("user", ["image", "overlay"])
def test_a_data_file_that_somebody_else_uses_stays(tmp_path: Path, user: str) -> None:
    _base, top, data = with_data_file(tmp_path / "images")
    if user == "image":
        other = top.with_name("other.qcow2")
        other.write_bytes(top.read_bytes())
        qemu_img("rebase", "-u", "-b", "", other)
    else:
        create(top.with_name("other.qcow2"), backing=data, backing_format="raw")
    access = Access(allow_data_file=(str(data),))
    report = chainmerge.merge(top, access=access, options=MergeOptions(delete=True))
    assert report.deleted == (str(top),)
    assert any("other.qcow2" in warning for warning in report.warnings)
    assert data.exists()


def test_base_is_not_taken_away_from_its_data_file(tmp_path: Path) -> None:
    store, vm = tmp_path / "store", tmp_path / "vm"
    store.mkdir()
    vm.mkdir()
    base = store / "base.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=base.data", base.name, "8M"],
        check=True, cwd=store,
    )  # fmt: skip
    top = create(vm / "top.qcow2", 8 * MIB, backing=None)
    qemu_img("rebase", "-u", "-F", "qcow2", "-b", str(base), top)
    access = Access(allow_backing=(str(store),), allow_data_file=(str(store / "base.data"),))
    options = MergeOptions(keep_name=True, direction="commit")
    plan = chainmerge.plan(top, access=access, options=options)
    assert DataFileOutOfReach.code in {refusal.code for refusal in plan.refusals}
    with pytest.raises(DataFileOutOfReach):
        chainmerge.merge(top, access=access, options=options)


def test_what_takes_tops_name_takes_its_attributes(tmp_path: Path) -> None:
    """Access control list, label and all; what base was open to is closed."""
    base, top, child = chain(tmp_path / "images")
    child.unlink()
    os.setxattr(top, "user.backup", b"weekly")
    os.setxattr(top, "security.selinux", b"system_u:object_r:svirt_image_t:s0:c1,c2\0")
    give_access_list(top, 65534)
    give_access_list(base, 1)
    os.setxattr(base, "user.backup", b"never")
    wanted = {name: os.getxattr(top, name) for name in os.listxattr(top)}
    report = chainmerge.merge(top, options=MergeOptions(keep_name=True, direction="commit"))
    assert {name: os.getxattr(top, name) for name in os.listxattr(top)} == wanted
    assert not report.warnings


def test_an_access_list_does_not_come_along(tmp_path: Path) -> None:
    base, top, child = chain(tmp_path / "images")
    child.unlink()
    give_access_list(base, 1)
    top.chmod(0o600)
    chainmerge.merge(top, options=MergeOptions(keep_name=True, direction="commit"))
    assert "system.posix_acl_access" not in os.listxattr(top)
    assert top.stat().st_mode & 0o777 == 0o600


def test_base_keeps_its_name_while_others_hold_it(tmp_path: Path) -> None:
    """Even if base holds all of top's data already, and nobody's content would change."""
    base, top, child = chain(tmp_path / "images")
    chainmerge.merge(child)
    chainmerge.merge(top)
    shown = content(top)
    options = MergeOptions(keep_name=True, direction="commit")
    assert_refused(child, BaseNamedByOthers, options)
    assert (content(top), content(child)) == (shown, shown)
    top.unlink()
    chainmerge.merge(child, options=options)
    assert content(child) == shown
    assert not base.exists()
