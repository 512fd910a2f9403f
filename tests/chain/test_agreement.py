# SPDX-License-Identifier: Apache-2.0
"""Random chains, as we and as QEMU follow them."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from chainmerge.chain.discovery import discover
from chainmerge.chain.model import ChainPolicy
from tests.support import qemu

SECTOR = 512


@dataclass(frozen=True)
class Level:
    """One image: where it lies, and by what kind of name the image above knows it."""

    directory: str
    name_kind: str
    sectors: int
    cluster_size: int
    raw: bool


LEVELS = st.lists(
    st.builds(
        Level,
        directory=st.sampled_from(["a", "b", "a/c"]),
        name_kind=st.sampled_from(
            ["relative", "absolute", "file", "link", "link elsewhere", "linked directory"]
        ),
        sectors=st.integers(1, 5000),
        cluster_size=st.sampled_from([512, 4096, 65536]),
        raw=st.booleans(),
    ),
    min_size=1,
    max_size=5,
)


def stored_name(image: Path, target: Path, kind: str, far: Path) -> str:
    """A name of *target* to be stored in *image*; where it is that of a link, the link is made.

    *image* is the path by which the image is reached: relative names count from there.
    """
    match kind:
        case "absolute":
            return str(target)
        case "file":
            return f"file:{target}"
        case "link":
            link = image.parent / f"link-to-{target.name}"
            link.symlink_to(target)
            return link.name
        case "link elsewhere":
            link = far / f"link-to-{target.name}"
            link.symlink_to(target)
            return str(link)
        case "linked directory":
            link = image.parent / f"directory-of-{target.name}"
            link.symlink_to(target.parent)
            return f"./{link.name}/{target.name}"
        case _:
            # The kernel goes up from the real directory, wherever a link was on the way.
            ups = len(image.parent.resolve().parts) - 1
            return "../" * ups + str(target).lstrip("/")


def build(levels: list[Level], root: Path) -> Path:
    """Create the chain, its first level at the bottom; return the path of its top image."""
    for directory in ("a/c", "b", "far"):
        (root / directory).mkdir(parents=True)
    files = [root / level.directory / f"image{index}" for index, level in enumerate(levels)]
    raw_root = levels[0].raw and len(levels) > 1
    reached = files[-1]
    for index in reversed(range(len(levels))):
        level = levels[index]
        size = level.sectors * SECTOR
        if index == 0 and raw_root:
            files[0].write_bytes(bytes(size - 100))
            continue
        options = f"cluster_size={level.cluster_size}"
        if index > 0:
            name = stored_name(reached, files[index - 1], levels[index - 1].name_kind, root / "far")
            options += f",backing_file={name}"
            options += f",backing_fmt={'raw' if index == 1 and raw_root else 'qcow2'}"
            reached = reached.parent / name.removeprefix("file:")
        qemu.qemu_img("create", "-q", "-u", "-f", "qcow2", "-o", options, files[index], str(size))
    return files[-1]


def as_qemu_sees_it(top: Path) -> list[dict[str, Any]]:
    """From top to root."""
    out = qemu.qemu_img("info", "--backing-chain", "-U", "-f", "qcow2", "--output=json", top)
    found: list[dict[str, Any]] = json.loads(out)
    return found


def place_of(name: Path | str | None) -> str | None:
    """The file that a name leads to: QEMU leaves the detours in names that we leave out."""
    return None if name is None else os.path.realpath(str(name).removeprefix("file:"))


@given(levels=LEVELS)
def test_our_chain_is_qemus_chain(levels: list[Level]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch).resolve()
        top = build(levels, root)
        ours = discover(top, ChainPolicy(allow_backing=(root,))).images[::-1]
        theirs = as_qemu_sees_it(top)
        real = [image.real_path for image in ours]
        places = [(place_of(image.path), place_of(image.backing)) for image in ours]
        expected = [
            (place_of(image["filename"]), place_of(image.get("full-backing-filename")))
            for image in theirs
        ]
    assert places == expected
    assert [image.backing_name for image in ours] == [
        image.get("backing-filename") for image in theirs
    ]
    assert [image.format for image in ours] == [image["format"] for image in theirs]
    assert [image.virtual_size for image in ours] == [image["virtual-size"] for image in theirs]
    assert (
        real
        == [root / level.directory / f"image{index}" for index, level in enumerate(levels)][::-1]
    )
