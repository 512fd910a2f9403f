# SPDX-License-Identifier: Apache-2.0
"""Images that guests and other programs have written: a directory that CHAINMERGE_FIXTURES names.

They are copied, never touched. Their names end in ``.qcow2`` or ``.qcow2.gz``. Where a backing
file or a data file is not among them, one full of zeros stands in for it.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path

from tests.support import qemu


def names() -> list[str]:
    """The images of the directory, as they are called without compression."""
    found = sorted(
        path.name.removesuffix(".gz")
        for path in _directory().iterdir()
        if path.name.endswith((".qcow2", ".qcow2.gz"))
    )
    assert found, f"no images in {_directory()}"
    return found


def copy_chain(name: str, directory: Path) -> list[Path]:
    """Copy an image, with what it needs, to a directory; the chain, from the root up."""
    image = directory / name
    _copy(name, image)
    described = qemu.info(image)
    details = described["format-specific"]["data"]
    if "data-file" in details:
        _give_data_file(image, described["virtual-size"])
    if "backing-filename" not in described:
        return [image]
    backing = Path(described["backing-filename"])
    if backing.name in names():
        return [*copy_chain(backing.name, directory), image]
    return [_stand_in(directory / backing.name, described["virtual-size"]), image]


def _directory() -> Path:
    return Path(os.environ["CHAINMERGE_FIXTURES"])


def _copy(name: str, to: Path) -> None:
    plain = _directory() / name
    if plain.exists():
        shutil.copyfile(plain, to)
        return
    with gzip.open(f"{plain}.gz") as packed, to.open("wb") as file:
        shutil.copyfileobj(packed, file)


def _stand_in(path: Path, size: int) -> Path:
    path.touch()
    os.truncate(path, size)
    return path


def _give_data_file(image: Path, size: int) -> None:
    """Have the copy name a data file beside it."""
    data = _stand_in(image.with_suffix(".data"), size)
    node = {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": str(image)},
        "data-file": {"driver": "file", "filename": str(data)},
    }
    qemu.qemu_img("amend", "-o", f"data_file={data}", "json:" + json.dumps(node))
