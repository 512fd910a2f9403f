# SPDX-License-Identifier: Apache-2.0
"""What a stored backing name means: QEMU's rules, minus what an untrusted image may not ask for.

The rules are those of ``bdrv_get_full_backing_filename`` and ``path_has_protocol`` in
QEMU 7.2's block.c.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chainmerge.chain.errors import BackingNameUnusable, JsonBackingName, RemoteBackingName

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.chain.model import ImageInfo

_FILE_PROTOCOL = "file"


def protocol_of(name: str) -> str | None:
    """The protocol that QEMU sees in a file name; None for a plain path.

    A colon is a protocol's end when no slash comes before it.
    """
    head, colon, _ = name.partition(":")
    return head if colon and "/" not in head else None


def path_from_header(text: str) -> str:
    """A name out of a header (UTF-8 with surrogate escapes) as this system's file API takes it."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def backing_path(image: Path, name: str) -> Path:
    """The file that the backing name *name*, stored in *image*, means.

    Args:
        image: absolute path by which the image was reached. A relative name counts from
            this path's directory; symbolic links are *not* resolved before, as in QEMU.
        name: the stored name.

    Returns:
        An absolute path, not normalised: ``..`` may follow a symbolic link.

    Raises:
        BackingNameUnusable, JsonBackingName, RemoteBackingName
    """
    if not name:
        raise BackingNameUnusable(str(image), name, "it is empty")
    if "\0" in name:
        raise BackingNameUnusable(str(image), name, "it contains a NUL byte")
    protocol = protocol_of(name)
    if protocol is None:
        return image.parent / path_from_header(name)
    if protocol == "json":
        raise JsonBackingName(str(image), name)
    if protocol != _FILE_PROTOCOL:
        raise RemoteBackingName(str(image), name, protocol)
    path = path_from_header(name).removeprefix(_FILE_PROTOCOL + ":")
    if not path.startswith("/"):
        raise BackingNameUnusable(
            str(image), name, "QEMU resolves a relative name behind `file:` wherever it is started"
        )
    return Path(path)


def without_detours(path: Path) -> Path:
    """The shortest spelling of an absolute path that goes the same way.

    ``..`` goes together with the directory before it. Behind a symbolic link it leads elsewhere,
    and behind what is not there nowhere: then both stay. No link is resolved.
    """
    if ".." not in path.parts:
        return path
    way: list[str] = []
    for part in path.parts[1:]:
        if part == ".." and not way:
            continue
        if part == ".." and way[-1] != ".." and _is_directory_itself(Path("/", *way)):
            way.pop()
        else:
            way.append(part)
    return Path("/", *way)


def _is_directory_itself(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def name_to_store(child: ImageInfo, backing: ImageInfo) -> str:
    """*backing* as the child's header should name it: relative where it has no absolute name."""
    stored = (child.backing_name or "").removeprefix("file:")
    if stored.startswith("/"):
        return str(backing.path)
    relative = os.path.relpath(backing.path, child.path.parent)
    # A relative name counts from the directory by which the child was reached. Where that
    # is a symbolic link, `..` leads elsewhere.
    leads = (child.path.parent / relative).resolve()
    if leads != backing.real_path:
        return str(backing.real_path)
    # What stands before a colon would be taken for a protocol.
    return f"./{relative}" if ":" in relative.split("/", 1)[0] else relative


def possible_backing_paths(image: Path, name: str) -> tuple[Path, ...]:
    """Every local file that the backing name *name* of *image* could mean, however it is written.

    For finding the users of an image, where missing one is worse than naming one too
    many: unlike :func:`backing_path` this also looks behind ``json:`` and other
    protocols.
    """
    local = name.split("\0", 1)[0]
    protocol = protocol_of(local)
    if protocol is None:
        texts = [local]
    elif protocol == "json":
        texts = list(_file_names(_parsed(local.removeprefix("json:"))))
    else:
        texts = [local.removeprefix(protocol + ":")]
    directories = (image.parent,) if protocol is None else (image.parent, *working_directory())
    return tuple(
        directory / path_from_header(text.removeprefix(_FILE_PROTOCOL + ":"))
        for text in texts
        if text and _is_file_name(text)
        for directory in directories
    )


def working_directory() -> tuple[Path, ...]:
    """The current directory, or nothing if it was removed."""
    try:
        return (Path.cwd(),)
    except OSError:
        return ()


def _is_file_name(text: str) -> bool:
    """Whether a file could have the name; JSON can spell strings that none has."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _file_names(tree: Any) -> Iterator[str]:
    """The values of all ``filename`` options in a block device description, flat or nested."""
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, list):
            pending += node
        elif isinstance(node, dict):
            for key, value in node.items():
                if isinstance(value, str) and key.rpartition(".")[2] == "filename":
                    yield value
                else:
                    pending.append(value)
