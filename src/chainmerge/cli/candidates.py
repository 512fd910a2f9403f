# SPDX-License-Identifier: Apache-2.0
"""What a word on the command line may become: images, their bitmaps, domains, codes of errors."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from click.shell_completion import CompletionItem

from chainmerge.errors import ChainmergeError, ExitCode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import click

    from chainmerge.documents.scan import DefinedDisk

_SUFFIXES: Final = (
    ".qcow2",
    ".qcow",
    ".img",
    ".raw",
    *(".vmdk", ".vhd", ".vhdx", ".vpc", ".vdi", ".qed", ".hdd"),
)
_QCOW2_MAGIC: Final = b"QFI\xfb"
_PATIENCE_SECONDS: Final = 3
"""How long somebody waits for libvirt who has pressed a key."""


def image_candidates(incomplete: str) -> list[CompletionItem[str]]:
    """Return images, devices, and the directories in which there may be more of them.

    An image is known by its suffix or, as snapshots often have suffixes of their own, by its
    first bytes.
    """
    return _names_of_files(incomplete, _leads_to_an_image)


def place_candidates(incomplete: str) -> list[CompletionItem[str]]:
    """Return where images may be looked for: volume groups, too."""
    images = image_candidates(incomplete)
    if "/" in incomplete:
        return images
    # Imported where it is used: it starts a process.
    from chainmerge.storage.lvm import groups_with_volumes  # noqa: PLC0415

    try:
        groups = groups_with_volumes()
    except ChainmergeError:
        groups = []
    return [*images, *(CompletionItem(name) for name in groups if name.startswith(incomplete))]


def format_candidates(incomplete: str) -> list[CompletionItem[str]]:
    """Return what ``PATH=FORMAT`` may become: images, and behind one the formats."""
    path, found, beginning = incomplete.rpartition("=")
    if not found:
        return [_to_go_on(item.value, "=") for item in image_candidates(incomplete)]
    from chainmerge.chain.foreign.formats import FOREIGN_FORMATS  # noqa: PLC0415 (for a shell)

    formats = ("qcow2", "raw", *sorted(FOREIGN_FORMATS))
    return [CompletionItem(f"{path}={one}") for one in formats if one.startswith(beginning)]


def key_file_candidates(incomplete: str) -> list[CompletionItem[str]]:
    """Return what ``[IMAGE=]FILE`` may become: files, and behind an image files again."""
    image, found, beginning = incomplete.rpartition("=")
    return [
        CompletionItem(f"{image}{found}{item.value}", type=item.type)
        for item in _names_of_files(beginning, _is_file_or_directory)
    ]


def _to_go_on(value: str, sign: str) -> CompletionItem[str]:
    """A word that is not at its end: the sign comes next, or a name in a directory."""
    return CompletionItem(value if value.endswith("/") else f"{value}{sign}")


def _names_of_files(
    incomplete: str, suits: Callable[[os.DirEntry[str]], bool]
) -> list[CompletionItem[str]]:
    folder, prefix = os.path.split(incomplete)
    try:
        with os.scandir(Path(folder or ".").expanduser()) as entries:
            found = [entry for entry in entries if _may_be(entry, prefix) and suits(entry)]
    except OSError:
        return []
    return [
        CompletionItem(_named(folder, entry), type="image")
        for entry in sorted(found, key=lambda entry: entry.name)
    ]


def _named(folder: str, entry: os.DirEntry[str]) -> str:
    name = os.path.join(folder, entry.name)  # noqa: PTH118 (as it was typed, ./ and ~ included)
    return f"{name}/" if entry.is_dir() else name


def _may_be(entry: os.DirEntry[str], prefix: str) -> bool:
    name = entry.name
    if not name.startswith(prefix) or (name.startswith(".") and not prefix):
        return False
    # A shell gets one candidate a line.
    return name.isprintable()


def _is_file_or_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file() or entry.is_dir()
    except OSError:
        return False


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


def domain_candidates(ctx: click.Context, incomplete: str) -> list[CompletionItem[str]]:
    """Return the domains of libvirt that have disks which can be merged."""
    names = dict.fromkeys(disk.domain for disk in _defined_disks(ctx))
    return [CompletionItem(name) for name in names if _is_word_like(name, incomplete)]


def disk_candidates(ctx: click.Context, incomplete: str) -> list[CompletionItem[str]]:
    """Return the disks, by their targets, of the domain that the command names before them."""
    domain = ctx.params.get("domain")
    disks = _defined_disks(ctx) if domain else ()
    targets = [disk.target for disk in disks if disk.domain == domain]
    return [CompletionItem(target) for target in targets if _is_word_like(target, incomplete)]


def _is_word_like(name: str, incomplete: str) -> bool:
    return name.startswith(incomplete) and name.isprintable()


def _defined_disks(ctx: click.Context) -> tuple[DefinedDisk, ...]:
    from threading import Timer  # noqa: PLC0415 (only for a shell)

    from chainmerge.live.libvirt.connection import DEFAULT_URI  # noqa: PLC0415 (as above)
    from chainmerge.live.libvirt.domains import domain_disks  # noqa: PLC0415 (as above)

    # What waits in libvirt's library is not to be woken up, only ended.
    end = Timer(_PATIENCE_SECONDS, os._exit, (ExitCode.FAILED,))
    end.daemon = True
    end.start()
    try:
        return domain_disks(ctx.params.get("connect") or DEFAULT_URI)
    except ChainmergeError:
        return ()
    finally:
        end.cancel()
