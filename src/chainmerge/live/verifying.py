# SPDX-License-Identifier: Apache-2.0
"""Whether a live merge that took effect has come out as planned: by the VM, and on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from chainmerge.chain.discovery import discover
from chainmerge.chain.model import ChainPolicy, ImageFormat
from chainmerge.chain.names import backing_path
from chainmerge.chain.opening import open_chain
from chainmerge.chain.reading import data_file_places
from chainmerge.documents.progress import ProgressEvent, Stage, never
from chainmerge.engines.metadata.bitmap_set import StoredBitmap
from chainmerge.errors import ChainmergeError
from chainmerge.live.errors import LiveVerificationFailed
from chainmerge.merging.verifying import verify_content, verify_soundness
from chainmerge.qcow2.bitmaps import BitmapFlag
from chainmerge.qcow2.bits import BitSet, union_all
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.records.identity import identify, may_be_same
from chainmerge.records.saved_bitmaps import load_saved_bitmaps
from chainmerge.storage.files import FileReadable
from chainmerge.storage.lvm_volumes import lasting_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.chain.opening import OpenChain, OpenImage
    from chainmerge.live.driver import LiveDriver
    from chainmerge.live.merge_nodes import MergeNodes
    from chainmerge.live.nodes import BlockGraph
    from chainmerge.records.live_journal import LiveJournal


def verify_in_vm(driver: LiveDriver[Any], nodes: MergeNodes) -> Iterator[str]:
    """Have the VM tell of its chain and its bitmaps; yields what was found.

    Raises LiveVerificationFailed.
    """
    above = driver.journal.above
    if above is None:
        if nodes.above is not None:
            upper = nodes.active.filename or nodes.active.name
            raise driver.differs(f"it is still the backing file of {upper}")
        yield f"the guest reads and writes {driver.base}, as {driver.TELLER} says"
    else:
        if nodes.above is None:
            raise driver.differs(f"it is not the backing file of {above.path}")
        if not _names_base(driver.journal, Path(above.path)):
            raise driver.differs(f"the header of {above.path} does not name it")
        yield f"{above.path} now uses {driver.base} as its backing file, as {driver.TELLER} says"
    yield from driver.verify_bitmaps(nodes)


def _names_base(journal: LiveJournal, above: Path) -> bool:
    """Whether the header of the image above leads to base, once the VM has ended."""
    with FileReadable(above) as readable:
        name = Qcow2Image(readable).header.backing_name
    if name is None or name == journal.backing_name:
        return name is not None
    try:
        return may_be_same(identify(backing_path(above, name)), journal.base)
    except (ChainmergeError, OSError):
        return False


def verify_on_disk(driver: LiveDriver[Any], layout: BlockGraph) -> Iterator[str]:
    """Read base back: nobody writes to it now.

    Args:
        driver: of the merge.
        layout: the VM's block graph.

    Raises LiveVerificationFailed, VerificationFailed.
    """
    driver.disk.let_others_in()
    journal = driver.journal
    top = Path(journal.top.path)
    if not top.exists() or not may_be_same(identify(top), journal.top):
        return
    # Relative names do not count from where the nodes of volumes are.
    with open_chain(discover(lasting_path(top), _trusting(layout, journal))) as opened:
        index = _index_of_base(opened, journal)
        base = opened.images[index]
        if base.image is not None:
            verify_soundness(base.image)
            yield "refcounts of base recomputed from the tables: no corruption"
            yield driver.verify_stored(
                base.image,
                tuple(_expected(journal, opened, base)),
                tuple(_expected_tombstones(journal, base)),
            )
        if journal.full_verify:
            size = opened.view().virtual_size
            yield verify_content(
                journal.base.path,
                opened.view(0, index + 1),
                opened.view(),
                lambda done: driver.caller.report(ProgressEvent(Stage.VERIFY, done, size)),
                never,
            )


def _index_of_base(opened: OpenChain, journal: LiveJournal) -> int:
    for number, image in enumerate(opened.images):
        if may_be_same(identify(image.info.real_path), journal.base):
            return number
    difference = f"the headers from {journal.top.path} on do not lead to it any more"
    raise LiveVerificationFailed(journal.base.path, difference)


def _trusting(layout: BlockGraph, journal: LiveJournal) -> ChainPolicy:
    """The VM has opened these images itself, wherever they lie, and what holds their data.

    What was allowed when the merge was asked for was looked at then. The process that reads them
    now may be another, which was told nothing.
    """
    nodes = {path: node for node in layout.chain() if (path := layout.path_of(node)) is not None}
    overlays = [path for one in journal.overlays if (path := Path(one.path)).exists()]
    qcow2 = [path for path, node in nodes.items() if node.driver == ImageFormat.QCOW2]
    return ChainPolicy(
        allow_backing=(Path("/"),),
        allow_data_files=tuple(
            place for image in (*qcow2, *overlays) for place in data_file_places(image)
        ),
        formats={path: node.format for path, node in nodes.items()},
    )


def _expected(journal: LiveJournal, opened: OpenChain, base: OpenImage) -> Iterator[StoredBitmap]:
    """What base has to hold: what was saved of it, united with what the overlays hold."""
    size = base.info.virtual_size
    saved = load_saved_bitmaps(Path(journal.base.path))
    before = {one.name: one.in_base for one in saved.bitmaps} if saved is not None else {}
    at = opened.images.index(base)
    for kept in journal.kept:
        sources = [opened.images[at + 1 + index].bits(kept.name) for index in kept.sources]
        own = before.get(kept.name)
        if own is not None:
            sources.append(own)
        elif kept.in_base:
            # An earlier run has settled this far and forgotten what it had saved.
            sources.append(base.bits(kept.name))
        yield StoredBitmap(kept.name, union_all(sources, size, kept.granularity), BitmapFlag.AUTO)


def _expected_tombstones(journal: LiveJournal, base: OpenImage) -> Iterator[StoredBitmap]:
    """Disabled bitmaps without bits, of whatever granularity they have; one may be missing."""
    for wanted in journal.tombstones:
        found = base.entries.get(wanted.name)
        granularity = wanted.granularity if found is None else found.granularity
        bits = BitSet.empty(base.info.virtual_size, granularity)
        yield StoredBitmap(wanted.name, bits, BitmapFlag(0))
