# SPDX-License-Identifier: Apache-2.0
"""The QEMU engine on real images: what arrives, what stays untouched, and how it fails."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import select
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from msgspec import Struct, field
from msgspec.structs import replace

from chainmerge.engines.qemu import daemon as qmp
from chainmerge.engines.qemu.commit import CopyProgress, commit_by_daemon
from chainmerge.engines.qemu.daemon import StorageDaemon
from chainmerge.engines.qemu.errors import CommandRefused, CommitFailed, DaemonFailed, DaemonMissing
from chainmerge.engines.qemu.nodes import ImageSpec
from chainmerge.errors import Interrupted
from tests.support.qemu import (
    assert_clean,
    bitmap_names,
    check,
    content,
    create,
    info,
    qemu_img,
    qemu_io,
    run,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

KIB = 1 << 10
MIB = 1 << 20


class Watch(Struct, frozen=True):
    """Records progress; stops the copy once *stop_after* reports have come."""

    stop_after: int | None = None
    reports: list[CopyProgress] = field(default_factory=list)

    def on_progress(self, progress: CopyProgress) -> None:
        self.reports.append(progress)

    def should_stop(self) -> bool:
        return self.stop_after is not None and len(self.reports) >= self.stop_after


def merge(*images: ImageSpec, base: int = 0, bandwidth: int | None = None) -> Watch:
    watch = Watch()
    commit_by_daemon(images, base, (), watch.on_progress, watch.should_stop, bandwidth=bandwidth)
    return watch


def qcow2(path: Path) -> ImageSpec:
    return ImageSpec(str(path), "qcow2")


def raw(path: Path) -> ImageSpec:
    return ImageSpec(str(path), "raw")


def digest(*paths: Path) -> list[str]:
    return [hashlib.md5(path.read_bytes()).hexdigest() for path in paths]


def never() -> bool:
    return False


def ignore(progress: CopyProgress) -> None:
    pass


@contextlib.contextmanager
def loop_device(path: Path) -> Iterator[Path]:
    device = run("losetup", "--find", "--show", path).stdout.strip()
    try:
        yield Path(device)
    finally:
        run("losetup", "--detach", device)


GEOMETRIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "equal": ({}, {}),
    "tiny-over-large": ({"cluster_size": "2M"}, {"cluster_size": 512}),
    "large-over-tiny": ({"cluster_size": 512}, {"cluster_size": "1M"}),
    "subclusters-over-plain": ({}, {"cluster_size": "128k", "extended_l2": "on"}),
    "plain-over-subclusters": ({"cluster_size": "128k", "extended_l2": "on"}, {}),
    "v3-over-v2": ({"compat": "0.10"}, {}),
    "zstd": ({"compression_type": "zstd"}, {"compression_type": "zstd"}),
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_tops_view_arrives_in_base_and_top_stays_as_it_is(tmp_path: Path, geometry: str) -> None:
    below, above = GEOMETRIES[geometry]
    base = create(tmp_path / "base", 12 * MIB, **below)
    qemu_io(base, "write -P 1 0 3M", "write -P 2 5M 100k", "write -c -P 3 8M 2M")
    top = create(tmp_path / "top", backing=base, **above)
    qemu_io(
        top,
        "write -P 4 300k 5k",
        "write -P 5 2M 1M",
        "write -z 1M 256k",
        "discard 128k 128k",
        "write -c -P 6 8M 1M",
        "write -P 7 6M 1",
        "write -P 8 11M 1M",
    )
    before, unchanged = content(top), digest(top)

    watch = merge(qcow2(base), qcow2(top))

    assert content(base) == before
    assert digest(top) == unchanged
    assert_clean(base)
    assert watch.reports[-1].done == watch.reports[-1].total > 0


def test_a_range_goes_down_in_one_pass_and_only_base_is_written(tmp_path: Path) -> None:
    root = create(tmp_path / "root", 4 * MIB)
    base = create(tmp_path / "base", backing=root)
    middle = create(tmp_path / "middle", backing=base)
    top = create(tmp_path / "top", backing=middle)
    qemu_io(root, "write -P 1 0 4M")
    qemu_io(base, "write -P 2 1M 1M")
    qemu_io(middle, "write -P 3 1536k 1M", "write -z 0 64k")
    qemu_io(top, "write -P 4 2M 10k")
    qemu_img("bitmap", "--add", top, "checkpoint")
    before, unchanged = content(top), digest(root, middle, top)

    merge(qcow2(root), qcow2(base), qcow2(middle), qcow2(top), base=1)

    assert content(base) == before
    assert digest(root, middle, top) == unchanged
    assert_clean(base)


@pytest.mark.parametrize("sizes", [(1, 5), (5, 1)], ids=["top-is-larger", "top-is-smaller"])
def test_base_grows_to_tops_size_but_never_shrinks(tmp_path: Path, sizes: tuple[int, int]) -> None:
    base = create(tmp_path / "base", sizes[0] * MIB)
    qemu_io(base, f"write -P 1 0 {sizes[0]}M")
    top = create(tmp_path / "top", sizes[1] * MIB, backing=base)
    qemu_io(top, "write -P 2 512k 128k")
    before, beyond = content(top), content(base)[sizes[1] * MIB :]

    merge(qcow2(base), qcow2(top))

    assert content(base) == before + beyond
    assert info(base)["virtual-size"] == max(sizes) * MIB
    assert_clean(base)


def test_growing_base_does_not_uncover_a_longer_backing_file(tmp_path: Path) -> None:
    root = create(tmp_path / "root", 4 * MIB)
    qemu_io(root, "write -P 1 0 4M")
    base = create(tmp_path / "base", 1 * MIB, backing=root)
    top = create(tmp_path / "top", 4 * MIB, backing=base)
    qemu_io(top, "write -P 2 3M 64k")
    before = content(top)

    merge(qcow2(root), qcow2(base), qcow2(top), base=1)

    assert content(base) == before


def test_zeros_beside_data_in_one_large_cluster_do_no_harm(tmp_path: Path) -> None:
    """QEMU does not order the two when it finds the zeros itself, and destroys base then."""
    base = create(tmp_path / "base", 32 * MIB, cluster_size="128k")
    qemu_io(base, "write -P 1 0 32M", "write -z 0 32M")
    top = create(tmp_path / "top", backing=base)
    clusters = [number * 128 for number in range(256)]
    qemu_io(top, *(f"write -P 2 {at}k 64k" for at in clusters))
    qemu_io(top, *(f"write -z {at + 64}k 64k" for at in clusters))
    before = content(top)

    merge(qcow2(base), qcow2(top))

    assert_clean(base)
    assert content(base) == before


def test_raw_base_takes_the_data_and_keeps_its_holes(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"\1" * MIB)
    top = create(tmp_path / "top", 64 * MIB, backing=base, backing_format="raw")
    qemu_io(top, "write -P 2 128k 64k", "write -z 512k 64k", "write -z 32M 16M")
    before = content(top)

    merge(raw(base), qcow2(top))

    assert base.read_bytes() == before
    assert base.stat().st_blocks * 512 < 2 * MIB


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_base_on_a_block_device(tmp_path: Path, image_format: str) -> None:
    backing = tmp_path / "disk"
    backing.write_bytes(bytes(8 * MIB))
    with loop_device(backing) as device:
        if image_format == "qcow2":
            qemu_img("create", "-q", "-f", "qcow2", device, "8M")
        top = create(tmp_path / "top", 8 * MIB, backing=device, backing_format=image_format)
        qemu_io(top, "write -P 7 1M 3M")
        before, unchanged = content(top), digest(top)

        merge(ImageSpec(str(device), image_format, is_block_device=True), qcow2(top))

        assert content(device, image_format) == before
        assert digest(top) == unchanged


def test_external_data_file(tmp_path: Path) -> None:
    data = tmp_path / "data"
    base = create(tmp_path / "base", 4 * MIB, data_file=str(data))
    qemu_io(base, "write -P 1 0 1M")
    top = create(tmp_path / "top", backing=base)
    qemu_io(top, "write -P 2 512k 2M")
    before = content(top)

    merge(replace(qcow2(base), data_file=str(data)), qcow2(top))

    assert content(base) == before


def test_encrypted_base(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret")
    secret = f"secret,id=key,file={key}"
    base, top = tmp_path / "base", tmp_path / "top"
    # QEMU times the key derivation in clock ticks, and gives up if a hash is too fast for them.
    options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.hash-alg=sha512"
    options += ",encrypt.iter-time=10"
    qemu_img("create", "-q", "--object", secret, "-f", "qcow2", "-o", options, base, "4M")
    create(top, 4 * MIB)
    qemu_io(top, "write -P 9 1M 1M")
    qemu_img("rebase", "-u", "-F", "qcow2", "-b", base, top)

    merge(replace(qcow2(base), key_file=str(key)), qcow2(top))

    opened = f"driver=qcow2,encrypt.key-secret=key,file.filename={base}"
    read = ("qemu-io", "--object", secret, "--image-opts", opened)
    run(*read, "-c", "read -P 9 1M 1M", "-c", "read -P 0 2M 2M")


@pytest.mark.parametrize(
    "name",
    ["a,b=c.qcow2", "nbd:there", 'quo"te\\n', "json:{}", "neu\n", os.fsdecode(b"caf\xe9")],
    ids=["comma", "protocol", "quote", "json", "newline", "not-utf-8"],
)
def test_odd_names_are_only_names(tmp_path: Path, name: str) -> None:
    base = create(tmp_path / "plain", 1 * MIB)
    top = create(tmp_path / "top", backing=base)
    qemu_io(top, "write -P 1 0 64k")
    before = content(top)
    odd = base.rename(tmp_path / name)

    merge(qcow2(odd), qcow2(top))

    assert content(odd.rename(base)) == before


def test_an_error_names_the_file_by_the_name_that_the_user_gave(tmp_path: Path) -> None:
    base = create(tmp_path / "base", 1 * MIB)
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    odd.write_bytes(b"not an image at all")
    with pytest.raises(CommitFailed) as raised:
        merge(qcow2(base), qcow2(odd))
    assert str(odd) in raised.value.reason
    assert "/proc/self" not in raised.value.reason


def tombstone(image: Path, name: str) -> None:
    qemu_img("bitmap", "--add", "--disable", image, name)


def test_disabled_bitmaps_of_base_come_through_as_they_are(tmp_path: Path) -> None:
    base = create(tmp_path / "base", 8 * MIB)
    for name in ("one", "two"):
        tombstone(base, name)
    top = create(tmp_path / "top", 16 * MIB, backing=base)
    qemu_io(top, "write -P 1 0 16M")

    merge(qcow2(base), qcow2(top))

    bitmaps = bitmap_names(base)
    assert sorted(bitmaps) == ["one", "two"]
    assert all(bitmap["flags"] == [] for bitmap in bitmaps.values())
    assert_clean(base)


def test_stopping_closes_base_and_a_second_run_finishes(tmp_path: Path) -> None:
    base = create(tmp_path / "base", 64 * MIB)
    tombstone(base, "kept")
    top = create(tmp_path / "top", backing=base)
    qemu_io(top, "write -P 1 0 64M")
    before, unchanged = content(top), digest(top)
    watch = Watch(stop_after=2)

    with pytest.raises(Interrupted):
        commit_by_daemon(
            [qcow2(base), qcow2(top)], 0, (), watch.on_progress, watch.should_stop, bandwidth=MIB
        )

    assert_clean(base)
    assert bitmap_names(base)["kept"]["flags"] == []
    assert digest(top) == unchanged
    assert watch.reports[-1].done < watch.reports[-1].total
    merge(qcow2(base), qcow2(top))
    assert content(base) == before


def test_a_full_volume_is_an_error_with_qemus_reason(tmp_path: Path) -> None:
    base = create(tmp_path / "base", 8 * MIB)
    os.truncate(base, 2 * MIB)
    top = create(tmp_path / "top", backing=base)
    qemu_io(top, "write -P 1 0 8M")
    unchanged = digest(top)

    with pytest.raises(CommitFailed, match="No space left on device") as raised:
        merge(replace(qcow2(base), limit=2 * MIB), qcow2(top))

    assert raised.value.facts["base"] == str(base)
    assert check(base)["corruptions"] == 0
    assert digest(top) == unchanged


def test_bitmaps_lost_while_closing_are_an_error_though_qemu_exits_with_0(tmp_path: Path) -> None:
    base = create(tmp_path / "base", 4 * MIB)
    tombstone(base, "kept")
    top = create(tmp_path / "top", backing=base)
    qemu_io(top, "write -P 1 0 4M")
    # Room for the 64 clusters of data and their L2 table, none for the new bitmap table.
    room = (-(-base.stat().st_size // (64 * KIB)) + 65) * 64 * KIB
    os.truncate(base, room)

    with pytest.raises(CommitFailed, match="ost persistent bitmaps"):
        merge(replace(qcow2(base), limit=room), qcow2(top))


def daemon_of(pid: int) -> int:
    """The storage daemon that process *pid* has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    (daemon,) = [int(child) for child in children if b"--monitor" in command_line(int(child))]
    return daemon


def command_line(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")


def test_a_killed_daemon_is_an_error_and_nothing_waits_for_it(tmp_path: Path) -> None:
    base = create(tmp_path / "base", 64 * MIB)
    top = create(tmp_path / "top", backing=base)
    qemu_io(top, "write -P 1 0 64M")

    def kill_it(progress: CopyProgress) -> None:
        os.kill(daemon_of(os.getpid()), signal.SIGKILL)

    with pytest.raises(CommitFailed, match="killed by signal 9"):
        commit_by_daemon([qcow2(base), qcow2(top)], 0, (), kill_it, never, bandwidth=MIB)

    merge(qcow2(base), qcow2(top))
    assert content(base) == content(top)


def test_an_exception_of_the_caller_ends_the_daemon(tmp_path: Path) -> None:
    base = create(tmp_path / "base", 64 * MIB)
    top = create(tmp_path / "top", backing=base)
    qemu_io(top, "write -P 1 0 64M")
    daemons = []

    def fail(progress: CopyProgress) -> None:
        daemons.append(os.pidfd_open(daemon_of(os.getpid())))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        commit_by_daemon([qcow2(base), qcow2(top)], 0, (), fail, never, bandwidth=MIB)

    assert select.select(daemons, [], [], 0)[0] == daemons
    assert_clean(base)
    os.close(daemons[0])


OFD_LOCK = struct.Struct("hhqqi4x")


def write_lock(start: int) -> bytes:
    return OFD_LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, 1, 0)


def is_locked(descriptor: int) -> bool:
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, write_lock(0))
    return bool(OFD_LOCK.unpack(answer)[0] != fcntl.F_UNLCK)


MERGE_FOREVER = """
import fcntl, os, sys
from chainmerge.engines.qemu.commit import commit_by_daemon
from chainmerge.engines.qemu.nodes import ImageSpec
base, top, lock_file, lock = sys.argv[1:]
descriptor = os.open(lock_file, os.O_RDWR)
fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, bytes.fromhex(lock))
def copying(progress):
    if progress.done and copying.first:
        copying.first = False
        os.close(descriptor)
        print("copying", flush=True)
copying.first = True
images = [ImageSpec(base, "qcow2"), ImageSpec(top, "qcow2")]
commit_by_daemon(images, 0, [descriptor], copying, lambda: False, bandwidth=65536)
"""


def test_a_kill_takes_the_daemon_along_and_the_lock_holds_until_it_is_gone(tmp_path: Path) -> None:
    base = create(tmp_path / "base", 64 * MIB)
    top = create(tmp_path / "top", backing=base)
    qemu_io(top, "write -P 1 0 64M")
    locked = tmp_path / "lock"
    locked.write_bytes(b"")
    arguments = [str(base), str(top), str(locked), write_lock(0).hex()]
    script = [sys.executable, "-c", MERGE_FOREVER, *arguments]
    with (
        locked.open("r+b") as mine,
        subprocess.Popen(script, stdout=subprocess.PIPE, text=True) as merging,
        contextlib.ExitStack() as at_last,
    ):
        at_last.callback(merging.kill)
        assert merging.stdout is not None
        assert merging.stdout.readline() == "copying\n"
        daemon = os.pidfd_open(daemon_of(merging.pid))
        # The merging process has closed its own descriptor: only the daemon's is left.
        assert is_locked(mine.fileno())

        merging.kill()

        # This waits for the lock, and so for the end of the daemon.
        fcntl.fcntl(mine.fileno(), fcntl.F_OFD_SETLKW, write_lock(0))
        assert select.select([daemon], [], [])[0] == [daemon]
        os.close(daemon)


def test_no_daemon_starts_for_a_process_that_is_gone(tmp_path: Path) -> None:
    witness = tmp_path / "started"

    def start(parent: int) -> None:
        guarded = ["sh", "-c", qmp._EXEC_UNLESS_ORPHANED, "sh", str(parent), "touch", str(witness)]
        subprocess.run(guarded, check=False)

    start(os.getpid() + 1)
    assert not witness.exists()
    start(os.getpid())
    assert witness.exists()


def fake_daemon(directory: Path, script: str) -> Path:
    program = directory / qmp.STORAGE_DAEMON
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return directory


def test_missing_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DaemonMissing, match=r"qemu-storage-daemon"):
        merge(qcow2(tmp_path / "base"), qcow2(tmp_path / "top"))


def test_daemon_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = fake_daemon(tmp_path, "echo 'cannot load library' >&2; exit 127")
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    with pytest.raises(
        DaemonFailed, match=r"did not start: it exited with status 127: cannot load library"
    ):
        StorageDaemon()


def test_a_command_that_is_refused_leaves_the_daemon_usable() -> None:
    with StorageDaemon() as daemon:
        with pytest.raises(CommandRefused, match=r"refused blockdev-del: .*nothing-here"):
            daemon.execute("blockdev-del", {"node-name": "nothing-here"})
        assert daemon.execute("query-named-block-nodes") == []
        assert daemon.wait_for_event(0.01) is None
        daemon.quit()


def test_a_daemon_that_heeds_no_signal_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "SECONDS_TO_END", 0.1)
    with StorageDaemon() as daemon:
        ended = os.pidfd_open(daemon.pid)
        os.kill(daemon.pid, signal.SIGSTOP)
    assert select.select([ended], [], [], 0)[0] == [ended]
    os.close(ended)


def test_a_talkative_daemon_neither_blocks_nor_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = "head -c 10000000 /dev/zero | tr '\\0' x >&2; exec " + str(
        qmp._found(qmp.STORAGE_DAEMON)
    )
    directory = fake_daemon(tmp_path, talk + ' "$@"')
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    with StorageDaemon() as daemon:
        daemon.quit()
    assert len(daemon.complaints) == qmp.MAX_COMPLAINT_BYTES


@pytest.mark.parametrize(
    ("said", "good"),
    [
        ("qemu-storage-daemon: warning: an option is deprecated", True),
        ("qemu-storage-daemon: Lost persistent bitmaps during inactivation of node", False),
    ],
)
def test_only_warnings_may_be_said_while_an_image_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, *, good: bool
) -> None:
    base = create(tmp_path / "base", 1 * MIB)
    top = create(tmp_path / "top", backing=base)
    qemu_io(top, "write -P 1 0 64k")
    real = qmp._found(qmp.STORAGE_DAEMON)
    (tmp_path / "bin").mkdir()
    directory = fake_daemon(tmp_path / "bin", f'{real} "$@"; status=$?; echo "{said}" >&2; exit 0')
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")

    outcome = contextlib.nullcontext() if good else pytest.raises(CommitFailed, match=said)
    with outcome:
        merge(qcow2(base), qcow2(top))
