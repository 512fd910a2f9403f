# SPDX-License-Identifier: Apache-2.0
"""A description of an image and of the images below it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from chainmerge.chain.allowed_places import allowed_places_of
from chainmerge.chain.discovery import discover
from chainmerge.chain.model import Chain
from chainmerge.chain.opening import OpenImage, open_chain
from chainmerge.chain.reading import identity_at
from chainmerge.chain.target import metadata_policy_of, relatives_of
from chainmerge.chain.unseen_users import volumes
from chainmerge.chain.view import GuestView
from chainmerge.documents.images import ChainReport, ImageReport, ImageUser
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.options import Access
from chainmerge.qcow2.features import Compression, extension_name
from chainmerge.qcow2.mapping import Kind
from chainmerge.storage.allocation import STAT_BLOCK
from chainmerge.storage.bystanders import openers_of
from chainmerge.storage.processes import program_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from chainmerge.chain.model import ChainPolicy, Identity, ImageInfo
    from chainmerge.chain.relatives import Relatives
    from chainmerge.qcow2.header import Header
    from chainmerge.storage.bystanders import Openers


def inspect(image: str | Path, access: Access | None = None) -> ChainReport:
    """Describe an image, the images below it, and others that use the same ones.

    Raises:
        ChainmergeError: the chain cannot be found or read.
    """
    access = access or Access()
    policy = metadata_policy_of(access, image)
    chain = _with_size_of_root(discover(Path(image), policy), policy)
    relatives = relatives_of(chain, max(0, len(chain.images) - 2), access, policy)
    others = _others(chain, relatives)
    shown = {one.identity: plain_path(one.path) for one in (*chain.images, *others)}
    openers = openers_of(Path(path) for path in shown.values())
    with open_chain(chain) as opened:
        parents = (None, *(shown[one.identity] for one in chain.images))
        reports = [
            _report(one.info, parent, shown, openers, in_chain=True, allocated=_allocated(one))
            for one, parent in zip(opened.images, parents, strict=False)
        ]
    reports += [
        _report(other, _parent_of(other, shown), shown, openers, in_chain=False, allocated=None)
        for other in others
    ]
    return ChainReport(
        REPORT_VERSION,
        shown[chain.top.identity],
        tuple(reports),
        tuple(_warnings(relatives)),
        relatives.searched,
    )


def _with_size_of_root(chain: Chain, policy: ChainPolicy) -> Chain:
    root, *others = chain.images
    if not root.foreign:
        return chain
    # As in discovery: few chains need it.
    from chainmerge.chain.foreign.sizing import sized_by_qemu  # noqa: PLC0415

    return Chain((sized_by_qemu(root, allowed_places_of([chain.top.path], policy)), *others))


def plain_path(path: Path) -> str:
    """The absolute path of an image without ``..``: as it was reached, wherever that is the same.

    A last component that is a link stays: links are what logical volumes are known by.
    """
    absolute = os.path.abspath(path)  # noqa: PTH100 (takes ".." out, which is the point)
    try:
        if os.path.samefile(absolute, path):  # noqa: PTH121
            return absolute
    except OSError:
        # There is nothing at one of them.
        pass
    # What is above a link is not what its name says.
    return os.path.join(os.path.realpath(path.parent), path.name)  # noqa: PTH118


def _others(chain: Chain, relatives: Relatives) -> tuple[ImageInfo, ...]:
    """The images outside the chain that use images of it, each once."""
    found = (
        *relatives.siblings,
        *relatives.middle_children,
        *(above.image for above in relatives.above),
    )
    in_chain = {image.identity for image in chain.images}
    once = {other.identity: other for other in found if other.identity not in in_chain}
    return tuple(once.values())


def _parent_of(other: ImageInfo, shown: Mapping[Identity, str]) -> str | None:
    """What the backing file of an image is called here."""
    if other.backing is None:
        return None
    identity = identity_at(other.backing)
    return (shown.get(identity) if identity else None) or plain_path(other.backing)


def _warnings(relatives: Relatives) -> Iterator[str]:
    for path, reason in relatives.unreadable:
        yield f"{path} could use these images too, but cannot be read: {reason}"
    if relatives.inactive:
        yield f"{volumes(relatives)} could use these images too, but cannot be read: not active"


def _report(
    info: ImageInfo,
    parent: str | None,
    shown: Mapping[Identity, str],
    openers: Openers,
    *,
    in_chain: bool,
    allocated: int | None,
) -> ImageReport:
    header = info.header
    path = shown[info.identity]
    occupied, written = on_disk(info)
    return ImageReport(
        path=path,
        format=info.format,
        format_declared=info.format_declared,
        in_chain=in_chain,
        parent=parent,
        virtual_size=info.guest_size or 0,
        file_size=info.file_size,
        allocated_bytes=allocated,
        cluster_size=header.cluster_size if header else None,
        details=dict(_details(header)) if header else {},
        bitmaps=len(info.bitmaps),
        snapshots=header.snapshot_count if header else 0,
        notes=info.notes,
        occupied_bytes=occupied,
        written_at=written,
        users=users_of(Path(path), openers),
    )


def on_disk(image: ImageInfo) -> tuple[int | None, int | None]:
    """What an image takes of its file system, in bytes, and when it was written (since 1970)."""
    if image.is_block_device:
        return None, None
    try:
        status = image.real_path.stat()
    except OSError:
        return None, None
    return status.st_blocks * STAT_BLOCK, int(status.st_mtime)


def users_of(image: Path, openers: Openers) -> tuple[ImageUser, ...] | None:
    """The processes that have an image open; None if that is not known."""
    processes = openers.processes.get(image, ())
    if not processes and not openers.all_seen:
        return None
    return tuple(ImageUser(process, program_of(process)) for process in processes)


def _details(header: Header) -> Iterator[tuple[str, str]]:
    yield "version", str(header.version)
    yield "refcount bits", str(header.refcount_bits)
    if header.extended_l2:
        yield "subclusters", str(header.subclusters_per_cluster)
    if header.compression_type is not Compression.ZLIB:
        yield "compression", header.compression_type.name.lower()
    if header.encrypted:
        yield "encryption", header.crypt_method.name
    if header.data_file_name is not None:
        yield "data file", header.data_file_name
    known = [extension_name(extension.type) for extension in header.extensions]
    if known:
        yield "extensions", ", ".join(known)


def _allocated(opened: OpenImage) -> int | None:
    """Guest bytes that the image itself defines; None if only QEMU could tell."""
    if opened.info.foreign:
        return None
    view = GuestView((opened.layer,))
    return sum(int(runs.length[runs.kind != Kind.UNALLOCATED].sum()) for runs in view.resolve())
