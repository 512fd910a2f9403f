# SPDX-License-Identifier: Apache-2.0
"""A description of an image and of the images below it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from chainmerge.chain.discovery import discover
from chainmerge.chain.opening import OpenImage, open_chain
from chainmerge.chain.target import metadata_policy_of, relatives_of
from chainmerge.chain.unseen_users import volumes
from chainmerge.chain.view import GuestView
from chainmerge.documents.images import ChainReport, ImageReport
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.options import Access
from chainmerge.qcow2.features import Compression, extension_name
from chainmerge.qcow2.mapping import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.chain.model import ImageInfo
    from chainmerge.chain.relatives import Relatives
    from chainmerge.qcow2.header import Header


def inspect(image: str | Path, access: Access | None = None) -> ChainReport:
    """Describe an image, the images below it, and others that use the same ones.

    Raises:
        ChainmergeError: the chain cannot be found or read.
    """
    access = access or Access()
    policy = metadata_policy_of(access, image)
    chain = discover(Path(image), policy)
    relatives = relatives_of(chain, max(0, len(chain.images) - 2), access, policy)
    reports: list[ImageReport] = []
    parent: str | None = None
    with open_chain(chain) as opened:
        for one in opened.images:
            reports.append(_report(one.info, parent, in_chain=True, allocated=_allocated(one)))
            parent = str(one.info.path)
    others = (
        *relatives.siblings,
        *relatives.middle_children,
        *(above.image for above in relatives.above),
    )
    reports += [
        _report(other, str(other.backing), in_chain=False, allocated=None) for other in others
    ]
    return ChainReport(
        REPORT_VERSION,
        str(image),
        tuple(reports),
        tuple(_warnings(relatives)),
        relatives.searched,
    )


def _warnings(relatives: Relatives) -> Iterator[str]:
    for path, reason in relatives.unreadable:
        yield f"{path} could use these images too, but cannot be read: {reason}"
    if relatives.inactive:
        yield f"{volumes(relatives)} could use these images too, but cannot be read: not active"


def _report(
    info: ImageInfo, parent: str | None, *, in_chain: bool, allocated: int | None
) -> ImageReport:
    header = info.header
    return ImageReport(
        path=str(info.path),
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
    )


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


def _allocated(opened: OpenImage) -> int:
    """Guest bytes that the image itself defines."""
    view = GuestView((opened.layer,))
    return sum(int(runs.length[runs.kind != Kind.UNALLOCATED].sum()) for runs in view.resolve())
