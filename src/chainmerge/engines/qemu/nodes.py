# SPDX-License-Identifier: Apache-2.0
"""A chain of images as QEMU's block nodes, each given explicitly.

So nothing that a header says makes QEMU open another file. Only the image that is written to,
if there is one, is open for writing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from msgspec import Struct

from chainmerge.engines.qemu.errors import CommandRefused
from chainmerge.engines.qemu.granules import may_detect_zeroes
from chainmerge.qcow2.header import parse_header
from chainmerge.storage.files import FileReadable

if TYPE_CHECKING:
    from chainmerge.engines.qemu.daemon import StorageDaemon

DIRECT_IO_BLOCK = 4096

# The formats whose nodes have a backing file that must be given, be it as "none".
_COW_FORMATS = frozenset({"qcow2", "qcow", "qed", "vmdk"})

Options: TypeAlias = dict[str, object]


class ImageSpec(Struct, frozen=True):
    """One image of the chain as QEMU is to open it.

    Attributes:
        path: Path of the file or block device.
        format: QEMU's name of the format: ``qcow2``, ``raw``, ``luks``, ``vmdk``, ...
        is_block_device: Whether *path* is a block device.
        data_file: Path of the external data file of a qcow2 image that has one.
        key_file: Path of a file that holds the passphrase of an encrypted image.
        limit: Bytes of its file that the image may use; the file must be at least so large.
            Writing beyond them fails as on a full volume. None for no limit.
    """

    path: str
    format: str
    is_block_device: bool = False
    data_file: str | None = None
    key_file: str | None = None
    limit: int | None = None


class Names(Struct, frozen=True):
    """What the daemon is told for each path, and the descriptors that it needs for that."""

    by_path: Mapping[str, str]
    descriptors: tuple[int, ...]

    def of(self, path: str) -> str:
        """What the daemon is told for *path*."""
        return self.by_path[path]

    def in_message(self, message: str) -> str:
        """*message* with the names that the user knows."""
        longest_first = sorted(self.by_path.items(), key=lambda item: -len(item[1]))
        for path, name in longest_first:
            message = message.replace(name, path)
        return message


class NodeChain(Struct, frozen=True):
    """The images from root to top, which of them is written, and what the daemon calls them."""

    images: Sequence[ImageSpec]
    written: int | None
    names: Names


def open_nodes(daemon: StorageDaemon, chain: NodeChain) -> None:
    """Have the daemon open the images, from root to top; see :func:`node_name`.

    Raises CommandRefused, with the image's path.
    """
    for index, image in enumerate(chain.images):
        try:
            if image.key_file is not None:
                daemon.execute("object-add", _secret(index, chain.names.of(image.key_file)))
            daemon.execute("blockdev-add", _node(chain, index))
        except CommandRefused as refused:
            # QEMU's own reason does not always say which image it means.
            reason = f"{image.path}: {refused.reason}"
            raise CommandRefused(refused.command, reason) from refused


def node_name(index: int) -> str:
    """The name of the node of the image with that position in the chain."""
    return f"image{index}"


def _secret(index: int, file_name: str) -> Options:
    return {"qom-type": "secret", "id": f"key{index}", "file": file_name}


def _node(chain: NodeChain, index: int) -> Options:
    """The arguments of ``blockdev-add`` for one image, with all its nodes."""
    image = chain.images[index]
    writable = index == chain.written
    node: Options = {
        "driver": image.format,
        "node-name": node_name(index),
        "read-only": not writable,
        "file": _limited(image, _protocol(chain, index, image.path)),
    }
    if writable:
        node["discard"] = "unmap"
        if _may_detect_zeroes(image):
            # The job copies zeros as data where the images above tell of them in pieces that
            # are too small for it. Like this they become zero clusters after all; the bound
            # of chainmerge.planning.space relies on it.
            node["detect-zeroes"] = "unmap"
        if image.format == "qcow2":
            # With them QEMU sets the dirty bit, and a kill would leave an image that has to be
            # repaired before anything else can be done with it.
            node["lazy-refcounts"] = False
    if image.format in _COW_FORMATS:
        node["backing"] = node_name(index - 1) if index > 0 else None
    if image.data_file is not None:
        node["data-file"] = _protocol(chain, index, image.data_file)
    if image.key_file is not None:
        node |= _decryption(image.format, f"key{index}")
    return node


def _protocol(chain: NodeChain, index: int, path: str) -> Options:
    image = chain.images[index]
    writable = index == chain.written
    is_block_device = image.is_block_device and path == image.path
    # A file of raw data is as long as the disk, to the byte.
    padding_harms = writable and (image.format == "raw" or path == image.data_file)
    direct = _takes_direct_io(path) and not (padding_harms and _ends_within_a_block(chain))
    return {
        "driver": "host_device" if is_block_device else "file",
        "filename": chain.names.of(path),
        "read-only": not writable,
        # The caller holds the locks, the same that QEMU would take.
        "locking": "off",
        "aio": "threads",
        "discard": "unmap",
        "cache": {"direct": direct},
    }


def _ends_within_a_block(chain: NodeChain) -> bool:
    """Whether base's disk ends, now or after the merge, where no block of a file system does.

    With direct I/O QEMU refuses to write to such a file, or makes it longer.
    """
    return any(
        _disk_size(chain.images[index]) % DIRECT_IO_BLOCK for index in (chain.written or 0, -1)
    )


def _disk_size(image: ImageSpec) -> int:
    with FileReadable(image.path) as readable:
        return parse_header(readable).virtual_size if image.format == "qcow2" else readable.size


def _limited(image: ImageSpec, protocol: Options) -> Options:
    if image.limit is None:
        return protocol
    return {"driver": "raw", "size": image.limit, "discard": "unmap", "file": protocol}


def _decryption(image_format: str, secret: str) -> Options:
    if image_format == "luks":
        return {"key-secret": secret}
    return {"encrypt": {"format": "luks", "key-secret": secret}}


def _may_detect_zeroes(image: ImageSpec) -> bool:
    """Whether zeros among the data may be written as zeros without destroying base.

    QEMU's qcow2 driver does not order writing zeros to one part of a cluster after a write to
    another part of it that is under way. The job never has two such writes under way if a
    cluster is no larger than what it copies at least.
    """
    if image.format == "raw":
        return True
    if image.format != "qcow2":
        return False
    with FileReadable(image.path) as readable:
        return may_detect_zeroes(parse_header(readable).cluster_size)


def _takes_direct_io(path: str) -> bool:
    """Whether the file system lets *path* be opened with O_DIRECT."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError:
        return False
    return True


@contextlib.contextmanager
def speakable_names(images: Sequence[ImageSpec]) -> Iterator[Names]:
    """Find a name in Unicode for every file.

    File names are bytes, JSON is Unicode. A file whose name is not valid UTF-8 is opened
    here, and the daemon reaches it through the descriptor that it inherits.
    """
    optional = [path for image in images for path in (image.data_file, image.key_file)]
    paths = [image.path for image in images] + [path for path in optional if path is not None]
    by_path: dict[str, str] = {}
    descriptors: list[int] = []
    with contextlib.ExitStack() as opened:
        for path in paths:
            absolute = os.path.abspath(path)  # noqa: PTH100 (must not resolve symbolic links)
            if not is_utf8(absolute):
                descriptors.append(os.open(absolute, os.O_PATH | os.O_CLOEXEC))
                opened.callback(os.close, descriptors[-1])
                absolute = f"/proc/self/fd/{descriptors[-1]}"
            by_path[path] = absolute
        yield Names(by_path, tuple(descriptors))


def is_utf8(name: str) -> bool:
    """Whether JSON, which is Unicode, has room for a file's name."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
