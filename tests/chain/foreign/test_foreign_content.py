# SPDX-License-Identifier: Apache-2.0
"""Size and content of images that only QEMU reads, as QEMU's own tools show them."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from chainmerge.chain.discovery import discover
from chainmerge.chain.errors import ForeignFormat, ForeignUnreadable, ImageReplaced
from chainmerge.chain.foreign.content import ForeignContent
from chainmerge.chain.model import ChainPolicy, ImageInfo
from chainmerge.chain.opening import open_chain
from chainmerge.storage.errors import ReadFailed
from tests.support.cli import environment
from tests.support.foreign import (
    DISK,
    FEW_KINDS,
    KIB,
    KINDS,
    MIB,
    Kind,
    foreign_image,
    virtual_size,
)
from tests.support.loopdev import loop_device
from tests.support.qemu import content, create, qemu_img, run

if TYPE_CHECKING:
    from collections.abc import Iterator


def described(image: Path, fmt: str) -> ImageInfo:
    """The image as the lowest one of a chain."""
    return discover(image, ChainPolicy(formats={image: fmt})).root


def servers(parent: int | None = None) -> set[str]:
    """The processes of qemu-nbd that a process has started, by default this one."""
    found = subprocess.run(
        ["pgrep", "-P", str(parent or os.getpid()), "-x", "qemu-nbd"],
        capture_output=True,
        text=True,
        check=False,
    )
    return set(found.stdout.split())


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Every format and subformat."""
    found = request.param
    assert isinstance(found, Kind)
    return found


def test_what_it_shows_is_what_qemu_shows(tmp_path: Path, kind: Kind) -> None:
    image = foreign_image(tmp_path, kind)
    expected = content(image, kind.format)
    root = described(image, kind.format)
    assert root.virtual_size == virtual_size(image, kind.format) == len(expected)
    with ForeignContent(root) as shown:
        assert servers() == set()
        assert shown.read(0, len(expected)) == expected
        assert shown.read(3 * MIB - 5, 10) == expected[3 * MIB - 5 : 3 * MIB + 5]
        assert shown.read(len(expected) - 3, 10) == expected[-3:] + bytes(7)
        assert shown.read(len(expected) + MIB, 2) == bytes(2)
        runs = [run for part in shown.zeroes(0, len(expected)) for run in part]
        assert len(servers()) == 1
    assert servers() == set()
    assert [start for start, _, _ in runs] == [0, *(end for _, end, _ in runs[:-1])]
    assert runs[-1][1] == len(expected)
    for start, end, is_zero in runs:
        assert not is_zero or not any(expected[start:end])


def test_what_is_not_allocated_is_known_to_be_zeros(tmp_path: Path) -> None:
    # QEMU's vhdx driver does not tell.
    for kind in FEW_KINDS[:-1]:
        root = described(foreign_image(tmp_path, kind, kind.name), kind.format)
        with ForeignContent(root) as shown:
            runs = [run for part in shown.zeroes(0, DISK) for run in part]
        assert sum(end - start for start, end, is_zero in runs if is_zero) >= 2 * MIB, kind


def test_several_threads_read(tmp_path: Path) -> None:
    image = foreign_image(tmp_path, KINDS[0])
    expected = content(image, "vmdk")
    with ForeignContent(described(image, "vmdk")) as shown, ThreadPoolExecutor(4) as threads:
        places = range(0, DISK, 64 * KIB)
        read = list(threads.map(lambda at: shown.read(at, 64 * KIB), places))
    assert b"".join(read) == expected


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    image = foreign_image(tmp_path, Kind("vdi"))
    odd = tmp_path / os.fsdecode(b'caf\xe9," .vdi')
    image.rename(odd)
    with ForeignContent(described(odd, "vdi")) as shown:
        assert shown.read(0, 4) == b"\x11" * 4


def test_a_device(tmp_path: Path) -> None:
    image = foreign_image(tmp_path, Kind("vdi"))
    os.truncate(image, (image.stat().st_size + MIB) // MIB * MIB)
    with (
        loop_device(image, image.stat().st_size) as device,
        ForeignContent(described(device, "vdi")) as shown,
    ):
        assert shown.read(7 * MIB, 4) == b"\x33" * 4


def test_qemu_has_so_much_memory_and_no_more(tmp_path: Path) -> None:
    image = foreign_image(tmp_path, Kind("vdi"))
    with ForeignContent(described(image, "vdi")) as shown:
        shown.read(0, 1)
        (server,) = servers()
        limits = Path("/proc", server, "limits").read_text(encoding="ascii")
    (line,) = [one for one in limits.splitlines() if one.startswith("Max address space")]
    assert line.split()[3] == str(16 << 30)


# What goes wrong


def test_qemu_says_why_it_cannot_be_read(tmp_path: Path) -> None:
    image = foreign_image(tmp_path, Kind("vdi"))
    with image.open("r+b") as file:
        file.seek(0x40)
        file.write(b"nope")
    root = described(image, "vdi")
    assert root.foreign
    assert root.guest_size is None
    with pytest.raises(ForeignUnreadable, match="VDI") as caught:
        _ = root.virtual_size
    assert "json:" not in caught.value.reason
    assert str(image) in caught.value.reason
    assert any("its size is not known" in note for note in root.notes)


def test_formats_that_are_not_read(tmp_path: Path) -> None:
    image = create(tmp_path / "old", DISK, fmt="qcow")
    with pytest.raises(ForeignFormat):
        _ = described(image, "qcow").virtual_size


def test_one_with_a_backing_file_of_its_own(tmp_path: Path) -> None:
    foreign_image(tmp_path, KINDS[0], "parent")
    child = tmp_path / "child.vmdk"
    qemu_img("create", "-q", "-f", "vmdk", "-b", "parent.vmdk", "-F", "vmdk", child)
    with pytest.raises(ForeignUnreadable, match="a backing file of its own"):
        _ = described(child, "vmdk").virtual_size


def test_without_qemus_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = foreign_image(tmp_path, Kind("vdi"))
    root = described(image, "vdi")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ForeignUnreadable, match="qemu-img, which reads it, is not installed"):
        _ = described(image, "vdi").virtual_size
    with ForeignContent(root) as shown, pytest.raises(ForeignUnreadable, match="qemu-nbd"):
        shown.read(0, 1)


@pytest.fixture
def read_once(tmp_path: Path) -> Iterator[ForeignContent]:
    """An image that is served."""
    with ForeignContent(described(foreign_image(tmp_path, Kind("vdi")), "vdi")) as shown:
        shown.read(0, 1)
        yield shown


def test_qemu_ends_too_early(read_once: ForeignContent) -> None:
    (server,) = servers()
    run("kill", "-KILL", server)
    with pytest.raises(ReadFailed, match="qemu-nbd"):
        read_once.read(0, 1)


def test_data_that_cannot_be_unpacked(tmp_path: Path) -> None:
    image = foreign_image(tmp_path, Kind("vmdk", "subformat=streamOptimized"))
    root = described(image, "vmdk")
    with image.open("r+b") as file:
        # Behind the header and the description, packed data begins.
        file.seek(64 * KIB)
        file.write(b"\xff" * 64 * KIB)
    with ForeignContent(root) as shown, pytest.raises(ReadFailed, match="qemu-nbd"):
        shown.read(0, DISK)


READ_AND_WAIT: Final = """
import sys
from pathlib import Path
from chainmerge.chain.discovery import discover
from chainmerge.chain.foreign.content import ForeignContent
from chainmerge.chain.model import ChainPolicy
image = Path(sys.argv[1])
with ForeignContent(discover(image, ChainPolicy(formats={image: "vdi"})).root) as shown:
    shown.read(0, 1)
    print("read", flush=True)
    sys.stdin.read()
"""


def test_qemu_ends_with_the_process_that_reads(tmp_path: Path) -> None:
    image = foreign_image(tmp_path, Kind("vdi"))
    with subprocess.Popen(
        [sys.executable, "-c", READ_AND_WAIT, image],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    ) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"read\n"
        (server,) = servers(reader.pid)
        watched = os.pidfd_open(int(server))
        try:
            assert select.select([watched], [], [], 0) == ([], [], [])
            reader.kill()
            assert select.select([watched], [], [], 30) == ([watched], [], [])
        finally:
            os.close(watched)


def test_another_image_under_its_name(tmp_path: Path) -> None:
    image = foreign_image(tmp_path, Kind("vdi"))
    root = described(image, "vdi")
    foreign_image(tmp_path, Kind("vdi"), "other").replace(image)
    with ForeignContent(root) as shown, pytest.raises(ImageReplaced):
        shown.read(0, 1)


def test_another_size_than_was_said(tmp_path: Path) -> None:
    image = foreign_image(tmp_path, Kind("vdi"))
    root = described(image, "vdi")
    with image.open("r+b") as file:
        file.write(create(tmp_path / "other", 2 * DISK, fmt="vdi").read_bytes())
    with ForeignContent(root) as shown, pytest.raises(ForeignUnreadable, match="had"):
        shown.read(0, 1)


def test_qemu_is_not_started_for_what_nobody_reads(tmp_path: Path) -> None:
    image = foreign_image(tmp_path, Kind("vdi"))
    leaf = create(tmp_path / "leaf.qcow2", backing=image, backing_format="vdi")
    with open_chain(discover(leaf, ChainPolicy())) as opened:
        assert [len(runs) for runs in opened.view().resolve()]
        assert servers() == set()
