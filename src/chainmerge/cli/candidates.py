# SPDX-License-Identifier: Apache-2.0
"""What a word on the command line may become: images, bitmaps of an image, codes of errors."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from click.shell_completion import CompletionItem

from chainmerge.errors import ChainmergeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import click

_SUFFIXES: Final = (".qcow2", ".img", ".raw")
_QCOW2_MAGIC: Final = b"QFI\xfb"


def image_candidates(incomplete: str) -> list[CompletionItem[str]]:
    """Return images, devices, and the directories in which there may be more of them.

    An image is known by its suffix or, as snapshots often have suffixes of their own, by its
    first bytes.
    """
    folder, prefix = os.path.split(incomplete)
    try:
        with os.scandir(Path(folder or ".").expanduser()) as entries:
            found = [entry for entry in entries if _is_candidate(entry, prefix)]
    except OSError:
        return []
    return [
        CompletionItem(_named(folder, entry), type="image")
        for entry in sorted(found, key=lambda entry: entry.name)
    ]


def _named(folder: str, entry: os.DirEntry[str]) -> str:
    name = os.path.join(folder, entry.name)  # noqa: PTH118 (as it was typed, ./ and ~ included)
    return f"{name}/" if entry.is_dir() else name


def _is_candidate(entry: os.DirEntry[str], prefix: str) -> bool:
    name = entry.name
    if not name.startswith(prefix) or (name.startswith(".") and not prefix):
        return False
    # A shell gets one candidate a line.
    return name.isprintable() and _leads_to_an_image(entry)


def _leads_to_an_image(entry: os.DirEntry[str]) -> bool:
    try:
        mode = entry.stat().st_mode
        if stat.S_ISDIR(mode) or stat.S_ISBLK(mode):
            return True
        return stat.S_ISREG(mode) and (
            entry.name.endswith(_SUFFIXES) or _begins_like_qcow2(entry.path)
        )
    except OSError:
        return False


def _begins_like_qcow2(path: str) -> bool:
    with Path(path).open("rb") as file:
        return file.read(len(_QCOW2_MAGIC)) == _QCOW2_MAGIC


def bitmap_candidates(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Return the bitmaps of the image that the command names before them."""
    image = ctx.params.get("source_image" if param.name == "sources" else "image")
    image = image or ctx.params.get("image") or ctx.params.get("leaf")
    named = ctx.params.get(param.name or "") or ()
    return [
        CompletionItem(name)
        for name in (_bitmap_names(Path(image).expanduser()) if image else ())
        if name.startswith(incomplete) and name.isprintable() and name not in named
    ]


def _bitmap_names(image: Path) -> Iterator[str]:
    # Imported where they are used: names of commands are completed without.
    from chainmerge.qcow2.bitmaps import read_directory  # noqa: PLC0415
    from chainmerge.qcow2.image import Qcow2Image  # noqa: PLC0415
    from chainmerge.storage.files import FileReadable  # noqa: PLC0415

    try:
        with FileReadable(image) as readable:
            directory = read_directory(Qcow2Image(readable))
    except (ChainmergeError, OSError):
        return
    yield from (entry.name for entry in directory)


def explained_candidates(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Return the codes that ``explain`` knows."""
    del ctx, param
    from chainmerge.catalogue import known_subjects  # noqa: PLC0415 (loads the whole package)

    return [
        CompletionItem(code) for code in known_subjects() if code.startswith(incomplete.lower())
    ]
