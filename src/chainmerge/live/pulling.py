# SPDX-License-Identifier: Apache-2.0
"""What a plan of a pull in a running VM has for itself: bitmaps, obstacles, the journal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from chainmerge.bitmaps.rules import Decision, Fate, LayerBitmaps, decide
from chainmerge.live.errors import LiveImageInUse, LiveNotWritable, LiveUnsuited
from chainmerge.live.inspection import (
    bitmap_obstacles,
    copied_before_write,
    left_writable,
    namesakes,
)
from chainmerge.live.nodes import UserKind
from chainmerge.options import Direction
from chainmerge.planning.aftermath import new_backing
from chainmerge.planning.encryption import has_encrypted
from chainmerge.planning.space.need import BitmapShape, shape_of_kept, shape_of_tombstone
from chainmerge.qcow2.bits import BitSet, union_all
from chainmerge.records.identity import identify
from chainmerge.records.live_journal import VERSION, KeptName, LiveJournal, TombstoneName

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from chainmerge.chain.opening import OpenChain
    from chainmerge.errors import ChainmergeError
    from chainmerge.live.nodes import BlockNode
    from chainmerge.live.port import InspectedVm
    from chainmerge.live.target import LiveTarget
    from chainmerge.options import LiveOptions
    from chainmerge.planning.facts import MergeFacts


_COPIES_INTO_SUBCLUSTERS: Final = (8, 2, 0)


def decide_to_pull(live: LiveTarget, layers: Sequence[LayerBitmaps]) -> tuple[Decision, ...]:
    """What becomes of each bitmap, where top is the result: as in a cold pull."""
    index, top = live.target.base_index, layers[-1]
    in_vm = {bitmap.name for node in live.nodes_above for bitmap in node.bitmaps}
    on_disk = {entry.name for one in live.target.relatives.above for entry in one.image.bitmaps}
    judged = list(layers)
    judged[index] = replace(judged[index], supports_bitmaps=top.supports_bitmaps)
    return tuple(
        decision
        if decision.granularity is None
        # QEMU does not change the granularity of a bitmap.
        else replace(decision, granularity=top.occurrence(decision.name).granularity)
        for decision in decide(judged, index, in_vm | on_disk, top_stays=False)
    )


def bits_of_pulled(
    live: LiveTarget, opened: OpenChain, decisions: Sequence[Decision]
) -> dict[str, BitSet]:
    """The bits that kept bitmaps will have, where nobody writes to any of the images."""
    if live.is_active:
        return {}
    return {
        decision.name: union_all(
            (opened.images[index].bits(decision.name) for index in decision.sources),
            live.top.virtual_size,
            decision.granularity,
        )
        for decision in decisions
        if decision.granularity is not None
    }


def shapes_of_pulled(
    live: LiveTarget, decisions: Sequence[Decision], known: Mapping[str, BitSet]
) -> Iterator[BitmapShape]:
    """What top's bitmaps will take at most when they are stored."""
    header, size = live.target.chain.top.header, live.top.virtual_size
    assert header is not None
    for decision in decisions:
        if decision.granularity is not None:
            bits = known.get(decision.name)
            yield shape_of_kept(
                decision.name, decision.granularity, bits, size, header.cluster_size
            )
        elif decision.tombstone:
            yield shape_of_tombstone(decision.name, live.granularity_of(decision.name))


def obstacles_to_pull(
    vm: InspectedVm, live: LiveTarget, opened: OpenChain, decisions: Sequence[Decision]
) -> Iterator[ChainmergeError]:
    """What speaks against a pull in this VM, besides what speaks against any."""
    if not (live.is_active or vm.pulls_into_middle):
        reason = "libvirt pulls into the active image alone"
        yield LiveUnsuited(vm.name, str(live.target.chain.top.path), reason)
    yield from _subclusters(vm, live)
    yield from _hides_what_is_below(vm, live)
    yield from left_writable(vm, live)
    yield from _other_users(vm, live)
    pulled = live.nodes[live.target.base_index : -1]
    yield from copied_before_write(
        vm, live, pulled, live.target.chain.images[-1 - len(pulled) : -1]
    )
    yield from bitmap_obstacles(vm, live, opened)
    yield from namesakes(vm, live, live.top)
    yield from _uneven(vm, live, decisions)
    yield from _stripped_from_others(vm, live, decisions)


def _subclusters(vm: InspectedVm, live: LiveTarget) -> Iterator[ChainmergeError]:
    """Top has extended L2 entries: by copying on read into them older QEMUs end (7.2).

    "bdrv_co_do_copy_on_readv: Assertion `skip_bytes < pnum' failed".
    """
    top = live.target.chain.top
    if top.header is None or not top.header.extended_l2:
        return
    version = vm.qemu_version
    if version < _COPIES_INTO_SUBCLUSTERS:
        reason = (
            f"it has extended L2 entries, and QEMU {'.'.join(map(str, version))} can crash when "
            "it copies into such an image; QEMU 8.2 and newer do not"
        )
        yield LiveUnsuited(vm.name, str(top.path), reason)


def _hides_what_is_below(vm: InspectedVm, live: LiveTarget) -> Iterator[ChainmergeError]:
    """The image right below top ends before both it and what it is to stand on.

    It hides what lies below behind its end, by zeros. QEMU's ``block-stream`` (7.2 to 10.0) takes
    everything there for done ("end of backing file has been reached") and puts none into top.
    """
    first = live.target.base_index
    if not first:
        return
    images = live.target.chain.images
    onto, hiding, top = images[first - 1], images[-2], images[-1]
    if hiding.virtual_size < min(onto.virtual_size, top.virtual_size):
        reason = (
            f"the disk of {hiding.path} ends at byte {hiding.virtual_size} and hides what "
            f"{onto.path} has behind that: QEMU would have it show"
        )
        yield LiveUnsuited(vm.name, str(top.path), reason)


def _other_users(vm: InspectedVm, live: LiveTarget) -> Iterator[ChainmergeError]:
    """Who uses top besides the image on it; the guest does, if that is what it writes to."""
    if live.is_active:
        return
    above = live.nodes_above[0].name
    others = [
        f"{user.kind} {user.name}".rstrip()
        for user in live.graph.users_of(live.top)
        if user.kind is not UserKind.JOB and (user.name, user.role) != (above, "backing")
    ]
    if others:
        yield LiveImageInUse(vm.name, str(live.target.chain.top.path), ", ".join(others))


def _uneven(
    vm: InspectedVm, live: LiveTarget, decisions: Sequence[Decision]
) -> Iterator[ChainmergeError]:
    """Bitmaps of disks of different sizes, which QEMU does not unite."""
    size = live.top.virtual_size
    sources = {index for decision in decisions for index in decision.sources}
    for index in sorted(sources):
        node = live.nodes[index]
        if node.virtual_size != size:
            reason = (
                f"its disk has {node.virtual_size} bytes, the merged one {size}, "
                "and there are bitmaps to merge"
            )
            yield LiveUnsuited(vm.name, str(live.target.chain.images[index].path), reason)


def _stripped_from_others(
    vm: InspectedVm, live: LiveTarget, decisions: Sequence[Decision]
) -> Iterator[ChainmergeError]:
    """Images that others stand on too, and that would lose bitmaps with top.

    libvirt removes a bitmap from all images of the chain.
    """
    names = () if vm.leaves_tombstones else _names_to_remove(vm, live, decisions)
    relatives = live.target.relatives
    others = (*relatives.siblings, *relatives.middle_children)
    lower = live.nodes[:-1]
    lost = [name for name in names if any(one.bitmap(name) is not None for one in lower)]
    if lost and others:
        reason = (
            f"libvirt would remove the bitmap {lost[0]!r} from the images below as well, "
            f"which {others[0].path} uses"
        )
        yield LiveUnsuited(vm.name, str(live.target.chain.top.path), reason)


def why_top_stays(
    vm: InspectedVm, live: LiveTarget, decisions: Sequence[Decision]
) -> Iterator[ChainmergeError]:
    """Why the VM cannot write to top, or not to its bitmaps."""
    path = str(live.target.chain.top.path)
    reason = vm.why_not_writable(live.top) if live.top.read_only else None
    if reason is not None:
        yield LiveNotWritable(vm.name, path, reason)
    changed: list[BlockNode] = [live.top] if decisions else []
    for node in changed:
        reason = vm.why_bitmaps_stay(node)
        if reason is not None:
            yield LiveUnsuited(vm.name, path, reason)


def _names_to_remove(vm: InspectedVm, live: LiveTarget, decisions: Sequence[Decision]) -> list[str]:
    """The names that go from top and leave nothing behind."""
    return [
        decision.name
        for decision in decisions
        if decision.fate is not Fate.KEEP
        and not (decision.tombstone and vm.leaves_tombstones)
        and live.top.bitmap(decision.name) is not None
    ]


def journal_of_pull(
    vm: InspectedVm,
    live: LiveTarget,
    decisions: Sequence[Decision],
    options: LiveOptions,
    facts: MergeFacts,
) -> LiveJournal:
    """What there is to do in the VM."""
    target, first = live.target, live.target.base_index
    backing = new_backing(facts)
    tombstones = [
        TombstoneName(
            name=decision.name,
            granularity=live.granularity_of(decision.name),
            in_base=live.top.bitmap(decision.name) is not None,
        )
        for decision in decisions
        if decision.tombstone and vm.leaves_tombstones
    ]
    return LiveJournal(
        version=VERSION,
        address=list(vm.address),
        job=live.job_id(options),
        base=identify(target.base.real_path),
        overlays=[identify(image.real_path) for image in live.merged_images],
        above=None if live.is_active else identify(live.above[0].real_path),
        backing_name=None if backing is None else backing[0],
        kept=[
            KeptName(
                name=decision.name,
                granularity=decision.granularity,
                in_base=True,
                sources=[
                    index - first for index in decision.sources if index < len(live.nodes) - 1
                ],
            )
            for decision in decisions
            if decision.granularity is not None
        ],
        stale=_names_to_remove(vm, live, decisions),
        tombstones=tombstones,
        delete=options.delete,
        full_verify=options.verify == "full" and not has_encrypted(target.chain),
        direction=Direction.PULL,
        base_format=target.base.format,
        onto=identify(target.chain.images[first - 1].real_path) if first else None,
    )
