# SPDX-License-Identifier: Apache-2.0
"""Backing formats that name a protocol, as QEMU before 9.0 wrote them: they mean raw."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge.chain.errors import FormatContradiction
from chainmerge.options import Access, MergeOptions
from tests.support.loopdev import loop_device
from tests.support.qemu import assert_clean, content, create, info, qemu_img, qemu_io

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DISK = 8 << 20


@pytest.fixture(params=["file", "host_device"])
def declared(request: pytest.FixtureRequest) -> str:
    """The name of the protocol."""
    return str(request.param)


@pytest.fixture
def base(tmp_path: Path, declared: str) -> Iterator[Path]:
    """A raw image with data: a file, or a device."""
    image = create(tmp_path / "base.raw", DISK, fmt="raw")
    qemu_io(image, "write -q -P 1 0 1M", fmt="raw")
    if declared == "file":
        yield image
        return
    with loop_device(image, DISK) as device:
        yield device


def stand(directory: Path, base: Path, declared: str, count: int) -> list[Path]:
    """Images over *base*, which the lowest declares as a protocol."""
    images: list[Path] = []
    for number in range(count):
        below = images[-1] if images else base
        image = create(
            directory / f"{number}.qcow2",
            backing=below,
            backing_format="qcow2" if images else "raw",
        )
        if not images:
            qemu_img("rebase", "-u", "-F", declared, "-b", base, image)
        qemu_io(image, f"write -q -P {number + 2} {number}M 512k")
        images.append(image)
    return images


def access(base: Path, said: str = "raw") -> Access:
    return Access({str(base): said}, allow_backing=(str(base.parent),), sole_user=True)


def test_the_base_is_merged_into(tmp_path: Path, base: Path, declared: str) -> None:
    top, leaf = stand(tmp_path, base, declared, 2)
    before = content(leaf)
    chainmerge.merge(top, base, access(base), MergeOptions(delete=True))
    assert content(leaf) == before
    assert info(leaf)["backing-filename-format"] == "raw"


def test_the_base_is_below_what_is_merged(tmp_path: Path, base: Path, declared: str) -> None:
    lower, upper = stand(tmp_path, base, declared, 2)
    before = content(upper)
    chainmerge.merge(upper, lower, access(base))
    assert content(lower) == before
    assert_clean(lower)


def test_the_base_is_pulled_from(tmp_path: Path, base: Path, declared: str) -> None:
    (top,) = stand(tmp_path, base, declared, 1)
    before = content(top)
    chainmerge.merge(top, base, access(base), MergeOptions(direction="pull"))
    assert content(top) == before
    assert "backing-filename" not in info(top)


def test_a_user_may_say_either(tmp_path: Path, base: Path, declared: str) -> None:
    (top,) = stand(tmp_path, base, declared, 1)
    for said in ("raw", declared):
        chainmerge.plan(top, base, Access({str(base): said}, (str(base.parent),), sole_user=True))
    with pytest.raises(FormatContradiction):
        chainmerge.plan(
            top, base, Access({str(base): "qcow2"}, (str(base.parent),), sole_user=True)
        )
