# SPDX-License-Identifier: Apache-2.0
"""Looks at a running VM and at its images on disk, and makes sure that they are the same chain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from chainmerge.arithmetic.counting import counted
from chainmerge.bitmaps.rules import BitmapState, LayerBitmaps, Occurrence
from chainmerge.bitmaps.stored import bitmaps_of
from chainmerge.chain.discovery import discover
from chainmerge.chain.model import Chain, ImageInfo, identity_of
from chainmerge.chain.reading import identity_of_opened
from chainmerge.chain.target import find_target, policy_of
from chainmerge.engines.qemu.nodes import is_utf8
from chainmerge.live.errors import (
    LiveBitmapBusy,
    LiveChainDiffers,
    LiveImageInUse,
    LiveJobRunning,
    LiveNotWritable,
    LiveOtherChildren,
    LiveUnsuited,
    NotInVm,
    VmRefused,
)
from chainmerge.live.nodes import BlockGraph, BlockNode, UserKind
from chainmerge.live.open_files import require_same_files
from chainmerge.live.target import LiveTarget
from chainmerge.qcow2.behind_end import old_bytes
from chainmerge.storage.files import FileReadable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from chainmerge.chain.model import Identity
    from chainmerge.chain.opening import OpenChain
    from chainmerge.errors import ChainmergeError
    from chainmerge.live.port import InspectedVm
    from chainmerge.options import Access

WITHOUT_GUEST: Final = "no device of the guest uses it, nor anything else that could move to base"


def locate(vm: InspectedVm, top: Path, base: Path | None, access: Access) -> LiveTarget:
    """Find the merge that was asked for in the VM and on disk.

    Raises:
        LiveImageExchanged: the VM has another file open than what is at an image's path.
        NotInVm: top or base is no image of this disk.
        LiveChainDiffers: the images on disk are not the VM's chain.
        LiveUnsuited: the VM does not tell what has to be known.
        ChainmergeError: what discovery raises.
    """
    graph = _graph_of(vm, top)
    chain = graph.chain()
    paths = [_required_path(vm, node, graph) for node in chain]
    require_same_files(vm, paths)
    identities = [_identity_at(path) for path in paths]
    position = _position_of(vm, top, paths, identities)
    whole = discover(paths[0], policy_of(access, top, base))
    _compare(vm, whole, chain, identities)
    target = find_target(top, base, access)
    return LiveTarget(
        target=target,
        graph=graph,
        nodes=tuple(reversed(chain[position:])),
        above=tuple(reversed(_above(whole, position))),
        nodes_above=tuple(reversed(chain[:position])),
    )


def _graph_of(vm: InspectedVm, top: Path) -> BlockGraph:
    """The VM's block graph. That nothing was changed, an error of the VM itself does not say."""
    try:
        return vm.graph()
    except VmRefused as refused:
        reason = (
            f"it does not answer a query that the merge depends on ({refused.command}: "
            f"{refused.reason})"
        )
        raise LiveUnsuited(vm.name, str(top), reason) from refused


def _above(whole: Chain, position: int) -> tuple[ImageInfo, ...]:
    """The images above the one at *position*, counted from the active one, active first."""
    return tuple(reversed(whole.images))[:position]


def _required_path(vm: InspectedVm, node: BlockNode, graph: BlockGraph) -> Path:
    path = graph.path_of(node)
    if path is None:
        driver = "nothing" if node.file is None else graph.nodes[node.file].driver
        reason = f"node {node.name} lies in {driver}, which is not a plain file or block device"
        raise LiveUnsuited(vm.name, node.name, reason)
    if node.reads_a_part:
        # Closed, it would be read from another place on as well.
        difference = f"the VM has {node.name} begin or end in the middle of {path}"
        raise LiveChainDiffers(vm.name, difference)
    return path


def _position_of(
    vm: InspectedVm, image: Path, paths: Sequence[Path], identities: Sequence[Identity | None]
) -> int:
    # Whether there is such an image at all, discovery says better.
    with FileReadable(image) as readable:
        wanted = identity_of_opened(readable)
    if wanted not in identities:
        raise NotInVm(vm.name, str(image), ", ".join(map(str, paths)))
    return identities.index(wanted)


def _compare(
    vm: InspectedVm, whole: Chain, chain: Sequence[BlockNode], identities: Sequence[Identity | None]
) -> None:
    on_disk = tuple(reversed(whole.images))
    for image, node, identity in zip(on_disk, chain, identities, strict=False):
        if image.identity != identity:
            difference = f"where the VM has node {node.name}, the headers lead to {image.path}"
            raise LiveChainDiffers(vm.name, difference)
        if image.format != node.format:
            difference = f"{image.path} is {image.format}, and the VM reads it as {node.format}"
            raise LiveChainDiffers(vm.name, difference)
    if len(on_disk) != len(chain):
        difference = (
            f"the VM's chain has {counted(len(chain), 'image')}, the one on disk has {len(on_disk)}"
        )
        raise LiveChainDiffers(vm.name, difference)


def _identity_at(path: Path | None) -> Identity | None:
    try:
        return None if path is None else identity_of(path.stat())
    except OSError:
        return None


def require_no_job(vm: InspectedVm, live: LiveTarget) -> None:
    """Make sure that nobody's job works on the disk.

    To be asked first: a job writes to images that are read-only otherwise, and until it ends
    their bitmaps are in-use on disk, and their tables change.

    Raises LiveJobRunning.
    """
    jobs = live.graph.jobs()
    if jobs:
        raise LiveJobRunning(vm.name, ", ".join(map(vm.described_job, jobs)))


def layers_of(live: LiveTarget, opened: OpenChain) -> tuple[LayerBitmaps, ...]:
    """The bitmaps of all images of the chain, root first, as the rules see them.

    The VM tells of them; what is on disk of an image that is open for writing is marked in-use,
    and may lack what was added since. Only of bitmaps that nothing vouches for the VM knows
    nothing: it has passed them over.
    """
    return tuple(
        bitmaps_of(image)
        if image.info.bitmaps and not image.info.bitmaps_trusted
        else LayerBitmaps(
            str(image.info.path),
            {
                bitmap.name: Occurrence(
                    bitmap.state,
                    bitmap.granularity,
                    bitmap.dirty_bytes == 0 if not bitmap.recording else None,
                )
                for bitmap in node.bitmaps
                if bitmap.persistent
            },
            image.info.supports_bitmaps,
        )
        for node, image in zip(live.nodes, opened.images, strict=True)
    )


def obstacles(vm: InspectedVm, live: LiveTarget, opened: OpenChain) -> Iterator[ChainmergeError]:
    """What speaks against a merge in this VM, besides what speaks against any."""
    yield from left_writable(vm, live)
    yield from _without_guest(vm, live)
    yield from _other_users(vm, live)
    yield from copied_before_write(vm, live, live.merged, live.merged_images)
    yield from _header_unchangeable(vm, live)
    yield from _other_images(vm, live)
    yield from bitmap_obstacles(vm, live, opened)
    yield from namesakes(vm, live, live.base)
    yield from _size_obstacles(vm, live)
    yield from _end_obstacles(vm, live, opened)


def unchangeable(
    vm: InspectedVm, live: LiveTarget, kept: Sequence[str], removed: Sequence[str]
) -> Iterator[ChainmergeError]:
    """Images that will be written to, and that the VM cannot write to.

    Args:
        vm: the VM.
        live: the merge.
        kept: the names of the bitmaps that base has afterwards.
        removed: of those that go, from base alone or from all images.
    """
    written = [live.base, *live.nodes_above[:1]]
    stripped = [] if vm.leaves_tombstones else _nodes_with(live, removed)
    for node in dict.fromkeys(one.name for one in (*written, *stripped) if one.read_only):
        reason = vm.why_not_writable(live.graph.nodes[node])
        if reason is not None:
            yield LiveNotWritable(vm.name, _name_of(live, node), reason)
    changed = [live.base, *stripped] if kept else stripped
    for node in dict.fromkeys(one.name for one in changed):
        reason = vm.why_bitmaps_stay(live.graph.nodes[node])
        if reason is not None:
            yield LiveUnsuited(vm.name, _name_of(live, node), reason)


def _nodes_with(live: LiveTarget, names: Sequence[str]) -> list[BlockNode]:
    """The images, from the root to the active one, that have a bitmap of one of these names."""
    nodes = (*live.nodes, *live.nodes_above)
    return [node for node in nodes if any(node.bitmap(name) is not None for name in names)]


def _name_of(live: LiveTarget, node: str) -> str:
    return str(live.graph.path_of(live.graph.nodes[node]) or node)


def left_writable(vm: InspectedVm, live: LiveTarget) -> Iterator[ChainmergeError]:
    """Images that the guest does not write to, and that the VM has open for writing all the same.

    QEMU leaves base so when an active merge is cancelled. Its bitmaps are stored when it is closed,
    so that what is on disk of them says nothing, and base could not be read back.
    """
    if live.is_active:
        return
    images = live.target.chain.images
    for node, image in list(zip(live.nodes, images, strict=True))[live.target.base_index :]:
        if not node.read_only and any(bitmap.persistent for bitmap in node.bitmaps):
            reason = (
                "it is open for writing, as after a merge into it that was undone, and its "
                "bitmaps are on disk only when it is closed"
            )
            yield LiveUnsuited(vm.name, str(image.path), reason)


def _without_guest(vm: InspectedVm, live: LiveTarget) -> Iterator[ChainmergeError]:
    """An active image that nobody uses: the job would have nobody to move over to base."""
    if live.is_active and not live.graph.is_read(live.top):
        yield LiveUnsuited(vm.name, str(live.target.chain.top.path), WITHOUT_GUEST)


def _other_users(vm: InspectedVm, live: LiveTarget) -> Iterator[ChainmergeError]:
    inner = live.nodes[live.target.base_index :]
    over = (*inner[1:], *live.nodes_above[:1])
    images = live.target.chain.images[live.target.base_index :]
    for node, above, image in zip(inner, over, images, strict=False):
        others = [
            f"{user.kind} {user.name}".rstrip()
            for user in live.graph.users_of(node)
            if user.kind is not UserKind.JOB and (user.name, user.role) != (above.name, "backing")
        ]
        if others:
            yield LiveImageInUse(vm.name, str(image.path), ", ".join(others))


def copied_before_write(
    vm: InspectedVm, live: LiveTarget, merged: Sequence[BlockNode], images: Sequence[ImageInfo]
) -> Iterator[ChainmergeError]:
    """Merged images with bitmaps of a filter, or of whatever else, on them.

    QEMU (7.2 to 10.0) ends with a failed assertion when it closes such an image.
    """
    for node, image in zip(merged, images, strict=True):
        watching = [
            one.name for one in live.graph.filters_on(node) if one.driver == "copy-before-write"
        ]
        if watching:
            reason = (
                f"the filter {watching[0]} copies what is written to it, as backups do: merge when "
                "the backup has ended"
            )
            yield LiveUnsuited(vm.name, str(image.path), reason)
        elif node.nameless_bitmaps:
            reason = (
                f"it has {counted(node.nameless_bitmaps, 'bitmap')} without a name, as backups and "
                "mirrors make, and QEMU would abort when it closes the image: merge when what "
                "they belong to has ended (`chainmerge live repair` lists it)"
            )
            yield LiveUnsuited(vm.name, str(image.path), reason)


def _header_unchangeable(vm: InspectedVm, live: LiveTarget) -> Iterator[ChainmergeError]:
    """An image above whose header QEMU would leave as it is, or give a wrong format.

    At a filter its ``block-commit`` stops without a word, and ``change-backing-file`` (7.2 to 10.0)
    declares the format of the image itself as that of its backing file.
    """
    if not live.nodes_above or not live.graph.has_filter_below(live.nodes_above[0]):
        return
    if live.base.format != live.nodes_above[0].format:
        reason = (
            f"a filter ({live.nodes_above[0].backing}) lies below it, and QEMU would declare the "
            f"format of {live.target.base.path} wrongly"
        )
        yield LiveUnsuited(vm.name, str(live.above[0].path), reason)


def _other_images(vm: InspectedVm, live: LiveTarget) -> Iterator[ChainmergeError]:
    known = {image.identity for image in live.above[:1]}
    others = [
        str(child.path) for child in live.target.relatives.children if child.identity not in known
    ]
    if others:
        yield LiveOtherChildren(vm.name, str(live.target.chain.top.path), ", ".join(others))


def bitmap_obstacles(
    vm: InspectedVm, live: LiveTarget, opened: OpenChain
) -> Iterator[ChainmergeError]:
    first = live.target.base_index
    for node, image in zip(live.nodes[first:], opened.images[first:], strict=True):
        path = str(image.info.path)
        busy = [bitmap.name for bitmap in node.bitmaps if bitmap.busy]
        if busy:
            yield LiveBitmapBusy(vm.name, path, ", ".join(map(repr, busy)))
        undecodable = [entry.name for entry in image.info.bitmaps if not is_utf8(entry.name)]
        if undecodable:
            reason = f"the name of bitmap {undecodable[0]!r} is not valid UTF-8"
            yield LiveUnsuited(vm.name, path, reason)
        elif node.read_only and image.info.bitmaps_trusted:
            yield from _bitmap_differences(vm, node, bitmaps_of(image))


def namesakes(vm: InspectedVm, live: LiveTarget, result: BlockNode) -> Iterator[ChainmergeError]:
    """A bitmap of the result in memory alone that has the name of one that is stored.

    A node has one bitmap of a name. What is kept would be united with one that is never stored, and
    an image above that has the name would pass for a complete checkpoint afterwards.
    """
    merged = live.nodes[live.target.base_index :]
    stored = {one.name for node in merged for one in node.bitmaps if one.persistent}
    for bitmap in result.bitmaps:
        if not bitmap.persistent and bitmap.name in stored:
            reason = (
                f"its bitmap {bitmap.name!r} is in memory alone, and another image that is merged "
                "has one of that name that is stored"
            )
            yield LiveUnsuited(vm.name, _name_of(live, result.name), reason)


def _bitmap_differences(
    vm: InspectedVm, node: BlockNode, on_disk: LayerBitmaps
) -> Iterator[ChainmergeError]:
    in_vm = {bitmap.name: bitmap.state for bitmap in node.bitmaps if bitmap.persistent}
    names = sorted(in_vm.keys() | on_disk.occurrences.keys())
    for name in names:
        there, here = in_vm.get(name, BitmapState.ABSENT), on_disk.state(name)
        if there is not here:
            difference = (
                f"bitmap {name!r} of {on_disk.image} is {there} in the VM and {here} on disk"
            )
            yield LiveChainDiffers(vm.name, difference)


def _size_obstacles(vm: InspectedVm, live: LiveTarget) -> Iterator[ChainmergeError]:
    base, merged = live.base, live.merged
    size = max(base.virtual_size, live.top.virtual_size)
    broken = [bitmap.name for bitmap in base.bitmaps if bitmap.inconsistent]
    path = str(live.target.base.path)
    if base.virtual_size < size and broken:
        reason = f"it would have to grow, and its bitmap {broken[0]!r} is inconsistent (in-use)"
        yield LiveUnsuited(vm.name, path, reason)
    uneven = [node for node in merged if node.virtual_size != size and node.bitmaps]
    if uneven:
        reason = (
            f"its disk has {uneven[0].virtual_size} bytes, the merged one {size}, "
            "and there are bitmaps to merge"
        )
        index = live.nodes.index(uneven[0])
        yield LiveUnsuited(vm.name, str(live.target.chain.images[index].path), reason)


def _end_obstacles(
    vm: InspectedVm, live: LiveTarget, opened: OpenChain
) -> Iterator[ChainmergeError]:
    """What would come to light as QEMU moves the end of base's disk, under a guest that runs."""
    base = opened.images[live.target.base_index]
    size = live.top.virtual_size
    before = min(live.base.virtual_size, base.layer.virtual_size)
    if before >= size:
        return
    path = str(base.info.path)
    if base.image is None:
        if base.info.is_block_device:
            reason = (
                f"its disk has {before} bytes, that of {live.target.chain.top.path} {size}, and "
                "what the volume holds behind the smaller one would show"
            )
            yield LiveUnsuited(vm.name, path, reason)
        return
    below = live.target.chain.images[: live.target.base_index]
    if below and below[-1].virtual_size > before:
        # QEMU hides what a longer backing file has there, by zeros.
        return
    obstacle = old_bytes(base.image, base.layer.source, size).obstacle
    if obstacle is not None:
        reason = (
            f"its disk has {before} bytes, that of {live.target.chain.top.path} {size}, and what "
            f"it holds behind the smaller one would show: {obstacle}"
        )
        yield LiveUnsuited(vm.name, path, reason)
