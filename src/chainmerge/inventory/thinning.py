# SPDX-License-Identifier: Apache-2.0
"""What thinning out the snapshots of a chain would do. Reads only."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct
from msgspec.structs import replace

from chainmerge.bitmaps.rules import BitmapState, chain_test
from chainmerge.bitmaps.stored import bitmaps_of
from chainmerge.chain.discovery import discover
from chainmerge.chain.information import on_disk
from chainmerge.chain.model import Chain
from chainmerge.chain.opening import open_chain
from chainmerge.chain.reading import identity_at
from chainmerge.chain.surroundings import Look
from chainmerge.chain.target import find_target, policy_of, relatives_of
from chainmerge.documents.plan import Finding
from chainmerge.documents.retention import ThinOutPlan
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.inventory.errors import (
    ActiveIsNotLeaf,
    NoSnapshotMatches,
    NotLeaf,
    ThinningUnfinished,
    UnfinishedMergeBelow,
)
from chainmerge.inventory.gain import first_own_index
from chainmerge.inventory.retention import Span, ViewFacts, judge, names_nothing, spans_of
from chainmerge.options import Access, MergeOptions
from chainmerge.planning.dry_run import Planned, beside_others, plan_beside
from chainmerge.planning.errors import BaseCannotHoldBitmaps, UnguardedBitmaps
from chainmerge.planning.freeing import footprints_of
from chainmerge.planning.removals import volumes_of
from chainmerge.records.request import shell_line
from chainmerge.records.thinning import load_thinning
from chainmerge.records.unfinished import status
from chainmerge.storage.bystanders import Wanted
from chainmerge.storage.errors import ImageInUse, ImageLocked
from chainmerge.storage.locks import LockMode, contentions
from chainmerge.storage.lvm_volumes import uuids_at
from chainmerge.storage.other_users import look_for_others

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.bitmaps.rules import LayerBitmaps
    from chainmerge.chain.model import Identity, ImageInfo
    from chainmerge.chain.relatives import Relatives
    from chainmerge.errors import ChainmergeError
    from chainmerge.options import Retention, Seconds
    from chainmerge.storage.lvm_volumes import KnownVolume

_LOSING_CHECKPOINTS: Final = frozenset({BaseCannotHoldBitmaps.code, UnguardedBitmaps.code})
_OF_OPEN_IMAGES: Final = frozenset({ImageInUse.code, ImageLocked.code})


def plan_thin_out(
    leaf: str | Path,
    retention: Retention,
    access: Access | None = None,
    options: MergeOptions | None = None,
    now: Seconds | None = None,
) -> ThinOutPlan:
    """Say which snapshots below *leaf* go and which stay. Nothing is written.

    Args:
        leaf: the uppermost image of the chain.
        retention: what keeps a snapshot.
        access: how images may be found and reached.
        options: how to merge; the merged images are always deleted, and names are kept.
        now: by what ages are judged, in seconds since 1970; None for the time of the call.

    Raises:
        NotLeaf: an image stands on *leaf*.
        NoSnapshotMatches: patterns alone say what stays, and none of them matches.
        ThinningUnfinished: an interrupted run is to be finished first.
        UnfinishedMergeBelow: an interrupted merge is.
        ChainmergeError: the chain cannot be found or read.
    """
    access, options = chain_access(leaf, access), range_options(options)
    thinning = load_thinning(Path(leaf))
    if thinning is not None:
        raise ThinningUnfinished(thinning.leaf, thinning.command or "chainmerge thin-out ...")
    return plan_chain(Path(leaf), retention, access, options, now).document


def range_options(options: MergeOptions | None) -> MergeOptions:
    """How each range is merged: its result has the name of its top, whose view stays."""
    return replace(options or MergeOptions(), delete=True, keep_name=True)


def chain_access(leaf: str | Path, access: Access | None) -> Access:
    """How images are reached, with the leaf as the upper end of the chain.

    Raises ActiveIsNotLeaf.
    """
    access = access or Access()
    if access.active is not None and identity_at(Path(access.active)) != identity_at(Path(leaf)):
        raise ActiveIsNotLeaf(str(leaf), str(access.active))
    return replace(access, active=str(leaf))


def options_of_range(chain: Chain, span: Span, options: MergeOptions) -> MergeOptions:
    """How one range is merged: its result keeps the format of its top as it keeps the name.

    A commit into a raw image would leave raw data under a name that everybody, the VM's
    configuration included, takes for a qcow2 image. Nor can a volume take over the name of a file,
    or of a volume of another group.
    """
    base, top = chain.images[span.base], chain.images[span.top]
    differ = base.format != top.format or _storage_of_name(base) != _storage_of_name(top)
    if options.direction == "auto" and differ:
        return replace(options, direction="pull")
    return options


def _storage_of_name(image: ImageInfo) -> str:
    """The volume group in which an image has its name; empty for a file or another device."""
    uuids = uuids_at(image.real_path)
    return "" if uuids is None else uuids.group


class PlannedThinning(Struct, frozen=True):
    """What is to be done, and the images that it is about.

    Attributes:
        document: What people are told.
        chain: The chain of the leaf.
        spans: The images that become one, in the order in which they are merged.
        claims: By span, bytes that those before it take, by the pool that they come from.
    """

    document: ThinOutPlan
    chain: Chain
    spans: tuple[Span, ...]
    claims: tuple[Mapping[str, int], ...]


def plan_chain(
    leaf: Path,
    retention: Retention,
    access: Access,
    options: MergeOptions,
    now: float | None,
) -> PlannedThinning:
    """As :func:`plan_thin_out`, of which an interrupted run is no concern."""
    now = time.time() if now is None else now
    chain = discover(leaf, policy_of(access, leaf))
    if len(chain.images) < 2:
        nothing = ThinOutPlan(REPORT_VERSION, str(chain.top.path), int(now), (), (), ())
        return PlannedThinning(nothing, chain, (), ())
    for unfinished in status([leaf]).merges:
        command = shell_line(["chainmerge", "status", unfinished.base])
        raise UnfinishedMergeBelow(unfinished.base, str(chain.top.path), command)
    look = Look()
    relatives = relatives_of(chain, 0, access, look=look)
    for child in relatives.children:
        raise NotLeaf(str(chain.top.path), str(child.path))
    refusals = tuple(contentions([(chain.top.path, LockMode.WRITER)]))
    snapshots = _snapshots_of(chain, relatives, leaf_is_free=not refusals)
    if names_nothing(retention, snapshots):
        raise NoSnapshotMatches(str(chain.top.path), ", ".join(retention.keep))
    held: dict[int, str] = {}
    while True:
        fates = judge(snapshots, retention, now, held)
        spans = spans_of(fates)
        planned, claims = _plan_spans(chain, spans, access, options, look)
        losing = dict(_losing_checkpoints(spans, planned))
        if not losing:
            break
        held |= losing
    plans = beside_others(planned)
    findings = [*map(Finding.of, refusals)]
    # Who has the leaf open has the images below it open too.
    told = _OF_OPEN_IMAGES if findings else frozenset()
    findings += [one for plan in plans for one in plan.refusals if one.code not in told]
    document = ThinOutPlan(
        version=REPORT_VERSION,
        leaf=str(chain.top.path),
        decided_at=int(now),
        snapshots=fates,
        ranges=plans,
        refusals=tuple(dict.fromkeys(findings)) if spans else (),
    )
    return PlannedThinning(document, chain, spans, claims)


def _plan_spans(
    chain: Chain, spans: Sequence[Span], access: Access, options: MergeOptions, look: Look
) -> tuple[tuple[Planned, ...], tuple[Mapping[str, int], ...]]:
    """The plan of each, and what those before it take of the space there is."""
    taken: Counter[str] = Counter()
    planned, claims = [], []
    for span in spans:
        base, top = chain.images[span.base], chain.images[span.top]
        target = find_target(top.path, base.path, access, look)
        claims.append(dict(taken))
        one = plan_beside(target, access, options_of_range(chain, span, options), dict(taken))
        planned.append(one)
        taken.update(one.taken_for_good)
    return tuple(planned), tuple(claims)


def _losing_checkpoints(
    spans: Sequence[Span], planned: Sequence[Planned]
) -> Iterator[tuple[int, str]]:
    """The lowest image of each range whose merge would lose a checkpoint, and why.

    It is the one that cannot hold what the others have.
    """
    for span, one in zip(spans, planned, strict=True):
        for refusal in one.plan.refusals:
            if refusal.code in _LOSING_CHECKPOINTS:
                yield span.base, refusal.sentence


def _snapshots_of(chain: Chain, relatives: Relatives, *, leaf_is_free: bool) -> list[ViewFacts]:
    branches = _branches(relatives)
    # Who has the leaf open has all of them open, which says nothing of any.
    users = _users_of(chain.images[:-1]) if leaf_is_free else {}
    beginning = _checkpoints_by_snapshot(chain)
    volumes = volumes_of(chain.images[:-1])
    footprints = footprints_of(chain.images[:-1])
    found = []
    for index, image in enumerate(chain.images[:-1]):
        occupied, written = on_disk(image)
        footprint = footprints.get(image.identity)
        found.append(
            ViewFacts(
                path=str(image.path),
                real_path=str(image.real_path),
                written=written,
                made=None if footprint is None else footprint.made,
                occupied=occupied if footprint is None else footprint.size,
                branches=tuple(branches.get(image.identity, ())),
                in_use=users.get(image.identity),
                not_removable=_why_not_removable(image, volumes.get(image.identity)),
                checkpoints=beginning.get(index, ()),
            )
        )
    return found


def lowest_own_image(leaf: str | Path, access: Access | None = None) -> str:
    """The path of the lowest image of a chain that nothing but the chain uses; as scans have it.

    Raises:
        ChainmergeError: the chain cannot be found or read.
    """
    access = chain_access(leaf, access)
    chain = discover(Path(leaf), policy_of(access, Path(leaf)))
    branches = _branches(relatives_of(chain, 0, access, look=Look()))
    # Each one's own chain is what the branches are beside.
    users = {identity: 1 + len(others) for identity, others in branches.items()}
    foreign = {image.identity for image in chain.images if image.foreign}
    first = first_own_index([image.identity for image in chain.images], users, foreign)
    return str(chain.images[first].path)


def _branches(relatives: Relatives) -> dict[Identity, list[str]]:
    found: dict[Identity, list[str]] = {}
    for image in (*relatives.siblings, *relatives.middle_children):
        identity = None if image.backing is None else identity_at(image.backing)
        if identity is not None:
            found.setdefault(identity, []).append(str(image.path))
    return found


def _users_of(images: Sequence[ImageInfo]) -> dict[Identity, str]:
    """Who keeps a merge from getting an image for itself, a sentence by image."""
    wanted = [[Wanted(image.path, LockMode.WRITER, dies=True)] for image in images]
    users: dict[Identity, str] = {}
    for image, others in zip(images, look_for_others(wanted), strict=True):
        refusals: list[ChainmergeError] = [*contentions([(image.path, LockMode.WRITER)])]
        for error in (*refusals, *others.refusals):
            users.setdefault(image.identity, error.sentence)
    return users


def _why_not_removable(image: ImageInfo, volume: KnownVolume | None) -> str | None:
    if volume is not None and volume.obstacle_to_removal is not None:
        return volume.obstacle_to_removal
    if image.is_block_device and volume is None:
        return "it is a block device and no logical volume: a merge neither deletes nor renames it"
    if image.foreign:
        return f"only QEMU can read its format, {image.format}"
    return None


def _checkpoints_by_snapshot(chain: Chain) -> dict[int, tuple[str, ...]]:
    """The checkpoints that begin with the image above a snapshot, by the snapshot's index."""
    if not any(image.bitmaps for image in chain.images):
        return {}
    with open_chain(chain) as opened:
        layers = [bitmaps_of(image) for image in opened.images]
    return checkpoints_by_snapshot(layers)


def checkpoints_by_snapshot(layers: Sequence[LayerBitmaps]) -> dict[int, tuple[str, ...]]:
    """As above, of the bitmaps of images from the root up to the leaf.

    A checkpoint that begins in the root has no snapshot below it, and is left out.
    """
    found: dict[int, tuple[str, ...]] = {}
    for name in sorted(layers[-1].occurrences):
        states: list[BitmapState] = [layer.state(name) for layer in reversed(layers)]
        verdict = chain_test(states)
        below = len(layers) - verdict.depth - 1
        if verdict.passes and below >= 0:
            found[below] = (*found.get(below, ()), name)
    return found
