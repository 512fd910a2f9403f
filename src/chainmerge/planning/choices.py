# SPDX-License-Identifier: Apache-2.0
"""Which engine writes, and into which image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from chainmerge.documents.plan import EngineName
from chainmerge.engines.native.commit import merged_layers
from chainmerge.engines.native.zeroes import ZeroRanges, find_zeroes
from chainmerge.errors import ChainmergeError, Interrupted
from chainmerge.options import Direction, EngineChoice
from chainmerge.planning.encryption import has_encrypted
from chainmerge.planning.errors import BaseForeign, NativeUnavailable, PullUnavailable
from chainmerge.storage.locks import AnyFile
from chainmerge.storage.transfer.copying import can_reflink

if TYPE_CHECKING:
    from collections.abc import Callable

    from chainmerge.chain.model import Chain
    from chainmerge.chain.opening import OpenChain
    from chainmerge.chain.target import Target
    from chainmerge.options import MergeOptions
    from chainmerge.planning.movement import GuestBytes
    from chainmerge.qcow2.image import Qcow2Image

# Of the file systems that share blocks; larger ones are rare.
_BLOCK = 4096


class EngineChosen(Struct, frozen=True):
    """Who writes, and why; with *obstacle* if nobody can as it was asked for."""

    engine: EngineName
    reason: str
    obstacle: ChainmergeError | None = None


def choose_engine(
    target: Target, opened: OpenChain, wanted: EngineChoice, direction: Direction
) -> EngineChosen:
    """Who writes guest data: the native engine wherever it can."""
    base = opened.images[target.result_index(direction)]
    if direction is Direction.PULL:
        return EngineChosen(EngineName.NATIVE, _native_reason(base.image))
    reason = _native_obstacle(target.chain, base.image)
    if wanted == "qemu":
        return EngineChosen(EngineName.QEMU, "qemu-storage-daemon copies, as requested")
    if reason is None:
        return EngineChosen(EngineName.NATIVE, _native_reason(base.image))
    obstacle = NativeUnavailable(str(target.base.path), reason) if wanted == "native" else None
    return EngineChosen(EngineName.QEMU, f"qemu-storage-daemon copies, because {reason}", obstacle)


def _native_obstacle(chain: Chain, base: Qcow2Image | None) -> str | None:
    if has_encrypted(chain):
        return "images are encrypted, and only QEMU can read them"
    if base is None:
        return None
    if base.header.external_data_file:
        return "base's guest data is in an external data file"
    return None


def _native_reason(base: Qcow2Image | None) -> str:
    if base is None:
        return "data is written straight into the raw image, below top, which hides it until then"
    return "everything new goes to free clusters, and one sector switches base to it"


class DirectionChosen(Struct, frozen=True):
    """Which way the merge goes, and why a pull cannot; with *obstacle* if one was asked for."""

    direction: Direction
    pull_obstacle: str | None
    obstacle: ChainmergeError | None = None


def choose_direction(
    target: Target, opened: OpenChain, volumes: GuestBytes, options: MergeOptions
) -> DirectionChosen:
    """Which way the merge goes.

    By itself a merge is a commit: what else uses base's or top's name relies on that. Where
    top's name is to be kept, both ways have the result there, and the one that moves less is
    taken.
    """
    reason = _pull_obstacle(target.chain, opened.images[-1].image, options)
    if options.direction == "pull":
        obstacle = None
        if reason is not None:
            obstacle = PullUnavailable(str(target.base.path), str(target.chain.top.path), reason)
        return DirectionChosen(Direction.PULL, reason, obstacle)
    commit_bytes = volumes.data + volumes.zero + volumes.compressed
    cheaper = reason is None and volumes.pull < commit_bytes
    can_go = not options.delete or _is_free(target)
    if options.direction == "auto" and options.keep_name and cheaper and can_go:
        return DirectionChosen(Direction.PULL, None)
    return DirectionChosen(Direction.COMMIT, reason)


def require_format_to_write(target: Target, direction: Direction) -> None:
    """Raise BaseForeign where data would go into an image that only QEMU reads."""
    base = target.base
    if base.foreign and direction is Direction.COMMIT:
        raise BaseForeign(str(base.path), base.format, str(target.chain.top.path))


def _is_free(target: Target) -> bool:
    """Whether base can go once top has what it holds."""
    base, relatives = target.base, target.relatives
    holds_snapshots = base.header is not None and base.header.snapshot_count
    others = relatives.siblings or relatives.middle_children
    return not (others or holds_snapshots or base.is_block_device)


def _pull_obstacle(chain: Chain, top: Qcow2Image | None, options: MergeOptions) -> str | None:
    if options.engine == "qemu":
        return "the qemu engine can only commit"
    if has_encrypted(chain):
        return "images are encrypted, and the qemu engine can only commit"
    if top is None or top.header.external_data_file:
        return "the native engine does not write into top"
    return None


def shares_extents(opened: OpenChain, base_index: int, direction: Direction) -> bool:
    """Whether the file system lets the result share all data that moves."""
    pulls = direction is Direction.PULL
    written = opened.images[-1 if pulls else base_index]
    result = written.readable
    merged = opened.images[base_index:-1] if pulls else opened.images[base_index + 1 :]
    sources = [image.layer.source for image in merged]
    # Smaller clusters are no whole blocks of the file system, and are copied.
    mapped = [image for image in (written, *merged) if image.image is not None]
    if any(image.layer.cluster_size < _BLOCK for image in mapped) or not isinstance(
        result, AnyFile
    ):
        return False
    return all(isinstance(one, AnyFile) and can_reflink(one, result) for one in sources)


def look_for_zeroes(
    target: Target, opened: OpenChain, direction: Direction, should_stop: Callable[[], bool]
) -> ZeroRanges | None:
    """What of the data that moves is zeros; None for a raw image, which has no zero clusters.

    Raises:
        Interrupted: *should_stop* said yes.
    """

    def before_each_read() -> None:
        if should_stop():
            raise Interrupted("nothing was written")

    image = opened.images[target.result_index(direction)].image
    if image is None:
        return None
    merged = merged_layers(opened.view(), target.base_index, direction)
    return find_zeroes(merged, image.header.subcluster_size, before_each_read)
