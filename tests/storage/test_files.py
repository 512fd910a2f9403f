# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainmerge.errors import ChainmergeError, Failed, Refused
from chainmerge.storage.errors import (
    AccessDenied,
    CannotOpen,
    FlushFailed,
    ImageMissing,
    ImageReadOnly,
    NoSpaceLeft,
    ReadFailed,
    WriteFailed,
    WrongFileType,
)
from chainmerge.storage.files import (
    FileReadable,
    WritablePort,
    fsync_directory,
    write_file_durably,
)
from tests.support.loopdev import device_that_loses_writes, loop_device, mounted_tmpfs
from tests.support.qemu import run

if TYPE_CHECKING:
    from collections.abc import Iterator

OPENERS = [FileReadable, WritablePort]
opener = pytest.mark.parametrize("opener", OPENERS)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's privileges."""
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


class TestReading:
    @given(content=st.binary(max_size=300), offset=st.integers(0, 400), length=st.integers(0, 400))
    def test_reads_as_if_zeros_followed_the_end(
        self, tmp_path_factory: pytest.TempPathFactory, content: bytes, offset: int, length: int
    ) -> None:
        image = tmp_path_factory.mktemp("reading") / "image"
        image.write_bytes(content)
        with FileReadable(image) as readable:
            assert readable.size == len(content)
            got = readable.read(offset, length)
        assert got == content[offset : offset + length].ljust(length, b"\0")

    @pytest.mark.parametrize("offset", [1 << 62, (1 << 63) - 10, (1 << 63) - 1, 1 << 63, 1 << 70])
    def test_offsets_of_hostile_images_read_as_zeros(self, tmp_path: Path, offset: int) -> None:
        image = tmp_path / "image"
        image.write_bytes(b"x" * 100)
        with FileReadable(image) as readable:
            assert readable.read(offset, 20) == bytes(20)

    def test_storage_that_answers_piecemeal(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The kernel may transfer less than was asked for; above 2 GiB it always does."""
        pread, pwrite = os.pread, os.pwrite
        monkeypatch.setattr(os, "pread", lambda fd, length, at: pread(fd, min(length, 7), at))
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
        data = bytes(range(100))
        with WritablePort(_touch(tmp_path / "image")) as port:
            port.write(3, data)
            assert port.read(0, 200) == (bytes(3) + data).ljust(200, b"\0")
            assert port.read(5, 50) == data[2:52]

    def test_an_error_of_the_storage_carries_its_place(self, tmp_path: Path) -> None:
        backing = tmp_path / "backing"
        with loop_device(backing, 4 << 20) as device:
            os.truncate(backing, 1 << 20)
            with FileReadable(device) as readable:
                assert readable.read(0, 4096) == bytes(4096)
                with pytest.raises(ReadFailed) as caught:
                    readable.read(3 << 20, 4096)
        assert caught.value.facts == {
            "image": str(device),
            "offset": 3 << 20,
            "length": 4096,
            "reason": "Input/output error",
        }

    def test_all_names_of_a_file_have_one_identity(self, tmp_path: Path) -> None:
        image, link, other = _touch(tmp_path / "i"), tmp_path / "l", _touch(tmp_path / "o")
        link.symlink_to(image)
        with FileReadable(image) as a, FileReadable(link) as b, FileReadable(other) as c:
            assert a.identity == b.identity != c.identity
            assert b.name == str(link)

    def test_the_descriptor_is_not_inherited_and_blocks(self, tmp_path: Path) -> None:
        with FileReadable(_touch(tmp_path / "image")) as readable:
            assert not os.get_inheritable(readable.fd)
            assert os.get_blocking(readable.fd)

    def test_closing_twice_closes_once(self, tmp_path: Path) -> None:
        readable = FileReadable(_touch(tmp_path / "image"))
        fd = readable.fd
        readable.close()
        with (tmp_path / "image").open("rb") as other:
            assert other.fileno() == fd  # the number is in use again
            readable.close()
            assert other.read() == b""


class TestOpening:
    @opener
    def test_nothing_there(self, tmp_path: Path, opener: type[FileReadable]) -> None:
        for path in (tmp_path / "none", _touch(tmp_path / "file") / "below"):
            with pytest.raises(ImageMissing) as caught:
                opener(path)
            assert caught.value.image == str(path)

    @opener
    def test_what_is_no_image_is_not_opened(
        self, tmp_path: Path, opener: type[FileReadable]
    ) -> None:
        pipe, sock = tmp_path / "pipe", tmp_path / "socket"
        os.mkfifo(pipe)  # nobody has it open for writing: to open it would wait for ever
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(sock))
            found = {path: _refusal(opener, path) for path in (pipe, sock, tmp_path, "/dev/zero")}
        assert {path: error.file_type for path, error in found.items()} == {  # type: ignore[attr-defined]
            pipe: "a named pipe",
            sock: "a socket",
            tmp_path: "a directory",
            "/dev/zero": "a character device",
        }
        assert all(isinstance(error, WrongFileType) for error in found.values())

    @opener
    def test_a_name_that_becomes_that_of_a_pipe(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opener: type[FileReadable]
    ) -> None:
        """Between our looking at it and our opening it, as a hostile user would have it."""
        path, stat = _touch(tmp_path / "image"), os.stat

        def look_too_early(name: str) -> os.stat_result:
            monkeypatch.setattr(os, "stat", stat)
            status = stat(name)
            path.unlink()
            os.mkfifo(path)
            return status

        monkeypatch.setattr(os, "stat", look_too_early)
        with pytest.raises(WrongFileType):
            opener(path)

    @opener
    def test_no_permission(self, tmp_path: Path, opener: type[FileReadable]) -> None:
        image = _touch(tmp_path / "image")
        image.chmod(0)
        with as_nobody(), pytest.raises(AccessDenied) as caught:
            opener(image)
        assert caught.value.access == ("writing" if opener is WritablePort else "reading")

    @opener
    @pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300])
    def test_names_that_cannot_be(self, opener: type[FileReadable], name: str) -> None:
        assert isinstance(_refusal(opener, name), CannotOpen)

    @opener
    def test_a_loop_of_links(self, tmp_path: Path, opener: type[FileReadable]) -> None:
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")
        assert isinstance(_refusal(opener, tmp_path / "a"), CannotOpen)

    def test_read_only_storage_can_be_read(self, tmp_path: Path) -> None:
        immutable = _touch(tmp_path / "image")
        with loop_device(tmp_path / "backing", 4096, "--read-only") as device:
            run("chattr", "+i", immutable)
            try:
                for image in (device, immutable):
                    FileReadable(image).close()
                    assert isinstance(_refusal(WritablePort, image), ImageReadOnly)
            finally:
                run("chattr", "-i", immutable)

    def test_a_read_only_file_system(self, tmp_path: Path) -> None:
        with mounted_tmpfs(tmp_path, 1 << 20) as mounted:
            image = _touch(mounted / "image")
            run("mount", "-o", "remount,ro", mounted)
            FileReadable(image).close()
            assert isinstance(_refusal(WritablePort, image), ImageReadOnly)

    def test_every_refusal_says_what_to_do(self, tmp_path: Path) -> None:
        error = _refusal(FileReadable, tmp_path / "{none}")
        assert str(tmp_path / "{none}") in error.sentence
        assert error.advice
        assert error.explanation


class TestWriting:
    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        image = _touch(tmp_path / "image")
        with WritablePort(image) as port:
            port.write(5000, memoryview(b"abcdef"))
            assert port.size == 5006
            port.write(10, bytearray(b"xy"))
            assert port.size == 5006
            assert port.read(4999, 8) == b"\0abcdef\0"
            port.flush()
            port.truncate_to(5002)
            assert port.size == 5002
        assert image.read_bytes() == bytes(10) + b"xy" + bytes(4988) + b"ab"

    def test_a_file_limit_cuts_a_write_in_the_middle(self, tmp_path: Path) -> None:
        """With RLIMIT_FSIZE the kernel writes what fits, and only then reports an error."""
        image = _touch(tmp_path / "image")
        script = (
            "import resource, sys\n"
            "from chainmerge.storage.files import WritablePort\n"
            "from chainmerge.storage.errors import WriteFailed\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))\n"
            "port = WritablePort(sys.argv[1])\n"
            "try: port.write(6000, b'z' * 8192)\n"
            "except WriteFailed as error: print(error.offset, error.length, port.size)\n"
        )
        assert run(sys.executable, "-c", script, image).stdout.split() == ["10000", "4192", "10000"]
        assert image.read_bytes() == bytes(6000) + b"z" * 4000

    def test_a_full_file_system(self, tmp_path: Path) -> None:
        with mounted_tmpfs(tmp_path, 1 << 20) as mounted:
            image = _touch(mounted / "image")
            with WritablePort(image) as port:
                with pytest.raises(NoSpaceLeft) as caught:
                    port.write(0, bytes(2 << 20))
                assert caught.value.offset == port.size == 1 << 20
                assert caught.value.length == 1 << 20
                # The storage is sound: what fits can be written.
                port.write(0, b"still works")
                port.flush()

    def test_beyond_the_end_of_a_device(self, tmp_path: Path) -> None:
        with loop_device(tmp_path / "backing", 8192) as device, WritablePort(device) as port:
            assert port.size == 8192
            with pytest.raises(NoSpaceLeft) as caught:
                port.write(4096, b"z" * 8192)
            assert (caught.value.offset, caught.value.length) == (8192, 4096)
            assert port.size == 8192
            assert port.read(0, 10000) == bytes(4096) + b"z" * 4096 + bytes(1808)

    def test_unaligned_writes_on_a_device_with_large_sectors(self, tmp_path: Path) -> None:
        backing = tmp_path / "backing"
        with (
            loop_device(backing, 16384, sector_size=4096) as device,
            WritablePort(device) as port,
        ):
            port.write(4000, b"across sectors" * 10)
            port.flush()
        assert backing.read_bytes() == (bytes(4000) + b"across sectors" * 10).ljust(16384, b"\0")

    def test_reserving_keeps_the_size(self, tmp_path: Path) -> None:
        with mounted_tmpfs(tmp_path, 1 << 20) as mounted:
            image = _touch(mounted / "image")
            with WritablePort(image) as port:
                port.reserve(0, 1 << 20)
                assert port.size == image.stat().st_size == 0
                with pytest.raises(NoSpaceLeft):
                    port.reserve(0, 2 << 20)
                (mounted / "other").touch()
                with pytest.raises(OSError, match="No space left"):
                    (mounted / "other").write_bytes(b"the space is taken")
                port.write(0, bytes(1 << 20))

    def test_a_failed_truncation(self, tmp_path: Path) -> None:
        with WritablePort(_touch(tmp_path / "image")) as port:
            with pytest.raises(WriteFailed):
                port.truncate_to(1 << 62)
            assert port.size == 0


class TestFlushing:
    def test_a_failed_flush_is_final(self, tmp_path: Path) -> None:
        with device_that_loses_writes(tmp_path, size=4 << 20, kept=1 << 20) as device:
            port = WritablePort(device)
            port.write(0, b"x" * (4 << 20))
            with pytest.raises(FlushFailed) as caught:
                port.flush()
            assert caught.value.reason == "Input/output error"
            # The reason for the rule: the kernel has told it once and forgotten it.
            os.fdatasync(port.fd)
            for attempt in (
                port.flush,
                lambda: port.write(0, b"x"),
                lambda: port.read(0, 1),
                lambda: port.reserve(0, 1),
                lambda: port.truncate_to(1),
            ):
                with pytest.raises(FlushFailed, match="Input/output error"):
                    attempt()
            port.close()

    def test_a_flush_is_a_flush(self, tmp_path: Path) -> None:
        """What was flushed has left the device's page cache: the file under it has it."""
        backing = tmp_path / "backing"
        with loop_device(backing, 1 << 20) as device, WritablePort(device) as port:
            port.write(0, b"y" * 65536)
            port.flush()
            assert backing.read_bytes()[:65536] == b"y" * 65536

    def test_directories(self, tmp_path: Path) -> None:
        fsync_directory(tmp_path)
        fsync_directory("/proc")  # has no fsync: there is nothing that could be lost
        with pytest.raises(FlushFailed):
            fsync_directory(tmp_path / "none")


class TestWritingFilesDurably:
    def test_creates_and_replaces(self, tmp_path: Path) -> None:
        target = tmp_path / "record"
        for data, mode in ((b"first" * 100_000, 0o600), (b"", 0o644), (b"third", 0o640)):
            write_file_durably(target, data, mode)
            assert target.read_bytes() == data
            assert target.stat().st_mode & 0o7777 == mode
        assert [path.name for path in tmp_path.iterdir()] == ["record"]

    def test_a_name_without_a_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        write_file_durably("record", b"data", 0o600)
        assert (tmp_path / "record").read_bytes() == b"data"

    def test_failing_leaves_the_old_one(self, tmp_path: Path) -> None:
        with mounted_tmpfs(tmp_path, 1 << 20) as mounted:
            target = mounted / "record"
            write_file_durably(target, b"old", 0o600)
            with pytest.raises(NoSpaceLeft) as caught:
                write_file_durably(target, bytes(2 << 20), 0o600)
            assert caught.value.image == str(target)
            assert target.read_bytes() == b"old"
            assert [path.name for path in mounted.iterdir()] == ["record"]

    def test_what_a_killed_process_left_is_used_up(self, tmp_path: Path) -> None:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.write_bytes(b"precious")
        (tmp_path / ".record.chainmerge-new").symlink_to(elsewhere)
        write_file_durably(tmp_path / "record", b"data", 0o600)
        assert elsewhere.read_bytes() == b"precious"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "record"]

    def test_killed_at_any_moment_it_is_the_old_or_the_new_one(self, tmp_path: Path) -> None:
        target = tmp_path / "record"
        script = (
            "import itertools, sys\n"
            "from chainmerge.storage.files import write_file_durably\n"
            "for n in itertools.count():\n"
            "    write_file_durably(sys.argv[1], b'%d' % (n % 10) * 50000, 0o600)\n"
            "    print(flush=True)\n"
        )
        for generations in range(1, 9):
            with subprocess.Popen(
                [sys.executable, "-c", script, target], stdout=subprocess.PIPE
            ) as writer:
                assert writer.stdout is not None
                for _ in range(generations):
                    writer.stdout.readline()
                writer.kill()
            content = target.read_bytes()
            assert len(content) == 50000
            assert len(set(content)) == 1

    def test_where_nothing_may_be_created(self, tmp_path: Path) -> None:
        cases = {
            tmp_path / "none" / "record": ImageMissing,
            Path("/proc/record"): ImageMissing,
            _touch(tmp_path / "file") / "record": ImageMissing,
            tmp_path / ("x" * 255): CannotOpen,
        }
        for target, error in cases.items():
            with pytest.raises(error):
                write_file_durably(target, b"data", 0o600)
        (tmp_path / "directory").mkdir()
        with pytest.raises(WriteFailed):
            write_file_durably(tmp_path / "directory", b"data", 0o600)
        assert not list(tmp_path.glob(".*"))


def test_reading_errors_are_failures_and_opening_errors_refusals() -> None:
    for refused in (ImageMissing, WrongFileType, AccessDenied, ImageReadOnly, CannotOpen):
        assert issubclass(refused, Refused)
    for failed in (ReadFailed, WriteFailed, NoSpaceLeft, FlushFailed):
        assert issubclass(failed, Failed)


def _refusal(opener: type[FileReadable], path: str | Path) -> ChainmergeError:
    with pytest.raises(Refused) as caught:
        opener(path)
    return caught.value


def _touch(path: Path) -> Path:
    path.touch()
    return path


def test_no_image_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """Whatever is printed would be written into it."""
    image = tmp_path / "image"
    image.write_bytes(b"image")
    script = """
import os, sys
from chainmerge.storage.transfer.direct import DirectFile
from chainmerge.storage.files import WritablePort
os.closerange(0, 3)
with WritablePort(sys.argv[1]) as port:
    direct = DirectFile(port, os.O_RDWR)
    for fd in range(3):
        try:
            os.write(fd, b"noise")
        except OSError:
            continue
        os._exit(1)
    assert port.read(0, port.size) == b"image"
os._exit(0)
"""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", script, str(image)], check=False, env=environ)
    assert ended.returncode == 0
    assert image.read_bytes() == b"image"
