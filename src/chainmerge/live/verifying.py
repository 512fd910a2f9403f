# SPDX-License-Identifier: Apache-2.0
"""Whether a live merge that took effect has come out as planned: by the VM, and on disk."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chainmerge.chain.discovery import discover
from chainmerge.chain.model import ChainPolicy, ImageFormat
from chainmerge.chain.names import backing_path
from chainmerge.chain.opening import open_chain
from chainmerge.chain.reading import begins_as_qcow2, data_file_places
from chainmerge.chain.target import policy_of
from chainmerge.chain.view import GuestView
from chainmerge.documents.progress import ProgressEvent, Stage, never
from chainmerge.engines.metadata.bitmap_set import StoredBitmap
from chainmerge.errors import ChainmergeError
from chainmerge.live.errors import LiveVerificationFailed
from chainmerge.live.merge_nodes import is_node_of
from chainmerge.merging.verifying import verify_content, verify_soundness
from chainmerge.options import Access
from chainmerge.qcow2.bitmaps import BitmapFlag
from chainmerge.qcow2.bits import BitSet, union_all
from chainmerge.qcow2.errors import FormatError
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.records.changes import is_there
from chainmerge.records.identity import identify, may_be_same
from chainmerge.records.request import access_of
from chainmerge.records.saved_bitmaps import load_saved_bitmaps
from chainmerge.storage.files import FileReadable
from chainmerge.storage.lvm_volumes import lasting_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from chainmerge.chain.opening import OpenChain, OpenImage
    from chainmerge.live.driver import LiveDriver
    from chainmerge.live.merge_nodes import MergeNodes
    from chainmerge.live.nodes import BlockGraph
    from chainmerge.records.identity import ImageIdentity
    from chainmerge.records.live_journal import LiveJournal


def verify_in_vm(driver: LiveDriver[Any], nodes: MergeNodes) -> Iterator[str]:
    """Have the VM tell of its chain and its bitmaps; yields what was found.

    Raises LiveVerificationFailed.
    """
    if driver.journal.pulls:
        yield _stands_on(driver, nodes)
    else:
        yield _is_stood_on(driver, nodes)
    yield from driver.verify_bitmaps(nodes)


def _stands_on(driver: LiveDriver[Any], nodes: MergeNodes) -> str:
    """Whether top stands on what was below base, in the VM and by its header.

    Raises LiveVerificationFailed.
    """
    journal = driver.journal
    top, onto = journal.top.path, journal.onto
    if onto is None:
        if nodes.below is not None:
            raise driver.differs(f"it still has a backing file in {driver.VM}")
        if _backing_name_of(Path(top)) is not None:
            raise driver.differs("its header still names a backing file")
        return f"{top} stands alone, as {driver.TELLER} says"
    if nodes.below is None or not is_node_of(nodes.below, driver.disk.layout(), onto):
        raise driver.differs(f"{onto.path} is not its backing file in {driver.VM}")
    if not _leads_to(Path(top), onto, journal.backing_name):
        raise driver.differs(f"its header does not name {onto.path}")
    return f"{top} now uses {onto.path} as its backing file, as {driver.TELLER} says"


def _is_stood_on(driver: LiveDriver[Any], nodes: MergeNodes) -> str:
    """Whether what was above the merged images stands on base, in the VM and by its header.

    Raises LiveVerificationFailed.
    """
    above = driver.journal.above
    if above is None:
        if nodes.above is not None:
            upper = nodes.active.filename or nodes.active.name
            raise driver.differs(f"it is still the backing file of {upper}")
        return f"the guest reads and writes {driver.base}, as {driver.TELLER} says"
    if nodes.above is None:
        raise driver.differs(f"it is not the backing file of {above.path}")
    if not _leads_to(Path(above.path), driver.journal.base, driver.journal.backing_name):
        raise driver.differs(f"the header of {above.path} does not name it")
    return f"{above.path} now uses {driver.base} as its backing file, as {driver.TELLER} says"


def _backing_name_of(image: Path) -> str | None:
    with FileReadable(image) as readable:
        return Qcow2Image(readable).header.backing_name


def _leads_to(image: Path, backing: ImageIdentity, given: str | None) -> bool:
    """Whether an image's header leads to another one, once the VM has ended; *given* does."""
    name = _backing_name_of(image)
    if name is None or name == given:
        return name is not None
    try:
        return may_be_same(identify(backing_path(lasting_path(image), name)), backing)
    except (ChainmergeError, OSError):
        return False


def verify_on_disk(driver: LiveDriver[Any], layout: BlockGraph) -> Iterator[str]:
    """Read the image back that was written: nobody writes to it now.

    Args:
        driver: of the merge.
        layout: the VM's block graph.

    Raises LiveVerificationFailed, VerificationFailed.
    """
    driver.disk.let_others_in()
    verify = _verify_top if driver.journal.pulls else _verify_base
    yield from verify(driver, layout)


def _verify_base(driver: LiveDriver[Any], layout: BlockGraph) -> Iterator[str]:
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


def _verify_top(driver: LiveDriver[Any], layout: BlockGraph) -> Iterator[str]:
    """Look at top, and at what it has been pulled from, as long as that is there."""
    journal = driver.journal
    policy, upper = _trusting(layout, journal), journal.merged[-1]
    # Relative names do not count from where the nodes of volumes are.
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(
            open_chain(discover(lasting_path(Path(journal.top.path)), policy))
        )
        top = opened.images[-1]
        assert top.image is not None
        verify_soundness(top.image)
        yield "refcounts of top recomputed from the tables: no corruption"
        if not is_there(upper):
            return
        below = stack.enter_context(open_chain(discover(lasting_path(Path(upper.path)), policy)))
        yield driver.verify_stored(
            top.image,
            tuple(_expected_of_top(journal, below, top)),
            tuple(_expected_tombstones(journal, top)),
        )
        if journal.full_verify:
            before = GuestView((*below.view().layers, top.layer))
            size = before.virtual_size
            verify_content(
                journal.top.path,
                opened.view(),
                before,
                lambda done: driver.caller.report(ProgressEvent(Stage.VERIFY, done, size)),
                never,
            )
            yield f"content of all {size} guest bytes compared with top on the images below"


def _expected_of_top(
    journal: LiveJournal, below: OpenChain, top: OpenImage
) -> Iterator[StoredBitmap]:
    """What top has to hold: what was saved, which is united already, or what there is."""
    saved = load_saved_bitmaps(Path(journal.top.path))
    united = {one.name: one.in_base for one in saved.bitmaps} if saved is not None else {}
    first = len(below.images) - len(journal.merged)
    for kept in journal.kept:
        bits = united.get(kept.name)
        if bits is None:
            # An earlier run has settled this far and forgotten what it had saved.
            sources = [below.images[first + index].bits(kept.name) for index in kept.sources]
            size = top.info.virtual_size
            bits = union_all([*sources, top.bits(kept.name)], size, kept.granularity)
        yield StoredBitmap(kept.name, bits, BitmapFlag.AUTO)


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
    images = [
        path for one in (journal.base, *journal.overlays) if _is_qcow2(path := Path(one.path))
    ]
    qcow2 = [path for path, node in nodes.items() if node.driver == ImageFormat.QCOW2]
    return ChainPolicy(
        allow_backing=(Path("/"),),
        allow_data_files=tuple(_data_files_of((*qcow2, *images))),
        formats={**_formats_given(journal), **{path: one.format for path, one in nodes.items()}},
    )


def _data_files_of(images: Iterable[Path]) -> Iterator[Path]:
    for image in images:
        # In a raw image a guest can write what looks like a header.
        with contextlib.suppress(FormatError):
            yield from data_file_places(image)


def _is_qcow2(image: Path) -> bool:
    if not image.exists():
        return False
    with FileReadable(image) as readable:
        return begins_as_qcow2(readable)


def _formats_given(journal: LiveJournal) -> Mapping[Path, str]:
    """The formats of what the VM may not have open any more: those that were given, and base's."""
    access = access_of(journal.known_request) or Access()
    base = {Path(journal.base.path): journal.base_format} if journal.base_format else {}
    return {**policy_of(access).formats, **base}


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
