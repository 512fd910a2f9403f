# SPDX-License-Identifier: Apache-2.0
"""Everything that is found in some places: images, chains, and what is wrong with them.

Reads only, and locks nothing: VMs may run meanwhile. No image is open for longer than it takes to
read its tables.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from chainmerge.arithmetic.counting import counted
from chainmerge.chain.allowed_places import Directories, allowed_places_of
from chainmerge.chain.information import users_of
from chainmerge.chain.model import ChainPolicy, ImageFormat, identity_of
from chainmerge.chain.names import without_detours
from chainmerge.documents.progress import OnProgress, ProgressEvent, Stage, unheard
from chainmerge.documents.scan import DefinedDisk, ScannedBitmap, ScannedImage, ScanReport
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.errors import ChainmergeError
from chainmerge.inventory.cache import Forgetful, Memory, key_of_chain, remembered
from chainmerge.inventory.findings.all import find_all
from chainmerge.inventory.findings.scene import FileSystemRoom, Scene, Usage
from chainmerge.inventory.forecast import forecasts
from chainmerge.inventory.found import FoundImage, ImageContent, Stamp, problem_of
from chainmerge.inventory.gain import first_own_index
from chainmerge.inventory.graph import ImageGraph
from chainmerge.inventory.places import Places, places_of
from chainmerge.inventory.scan_history import line_of_scan
from chainmerge.inventory.scanning import (
    Surveyor,
    as_found,
    content_below,
    image_content,
    stamp_of,
)
from chainmerge.inventory.summary import (
    ChainFacts,
    chain_facts,
    images_of_merges,
    most_freed_first,
    summary_of,
)
from chainmerge.options import Access, ScanOptions, require_instance
from chainmerge.records.files import STATE_DIRECTORY
from chainmerge.records.history import add_scan, scans_of
from chainmerge.records.unfinished import status
from chainmerge.storage.bystanders import openers_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from chainmerge.chain.model import Identity
    from chainmerge.documents.images import ImageUser
    from chainmerge.documents.status import UnfinishedMerge
    from chainmerge.storage.bystanders import Openers

LIBVIRT: Final = "libvirt"
"""In place of the disks of all domains, in what tells that two scans are of the same places."""
_IMAGE_SUFFIXES: Final = (".qcow2", ".qcow")
_TOLD_EVERY: Final = 64
_NANOSECONDS: Final = 10**9
_MOST_LEFT_OUT: Final = 40


def scan(
    paths: Sequence[str | Path] = (),
    access: Access | None = None,
    options: ScanOptions | None = None,
    domains: tuple[DefinedDisk, ...] | None = None,
    on_progress: OnProgress = unheard,
) -> ScanReport:
    """Look at all images in some places, and say what is wrong with them and their chains.

    Args:
        paths: directories, with everything below them; images; names of volume groups. By
            default the disks in *domains*, and without those the current directory.
        access: where backing files may lie outside of these places.
        options: from when on something is said.
        domains: the disks of all domains, as :func:`chainmerge.domain_disks` returns them; an
            image that is neither one of them nor below one is reported as unused.
        on_progress: told how far it has come.

    Raises:
        PlaceUnreadable, PlaceTooLarge
    """
    access, options = access or Access(), options or ScanOptions()
    if domains is not None:
        require_instance("domains", domains, tuple)
        for disk in domains:
            require_instance("domains", disk, DefinedDisk)
    now_ns, began = time.time_ns(), time.monotonic()
    there, lost = _disks_that_are_there(domains or ())
    wanted = (*paths, *there) if paths or domains is not None else (".",)
    places = places_of(
        wanted,
        one_file_system=options.one_file_system,
        told=lambda count: on_progress(ProgressEvent(Stage.FIND, done=count)),
    )
    reach = replace(access, allow_backing=(*access.allow_backing, *map(str, places.roots)))
    with remembered() if options.cache else contextlib.nullcontext(Forgetful()) as memory:
        survey = _Survey(places, reach, memory, on_progress)
        graph = ImageGraph(survey.images())
        openers = openers_of(Path(image.path) for image in graph.images.values())
        in_use = frozenset(_open_ones(graph, openers))
        if options.check:
            graph = ImageGraph(survey.checked(graph, in_use))
        chains = dict(survey.chains(graph))
    merges, not_searched = _merges_in(places)
    usage = Usage(in_use, openers.all_seen, domains, _identities_at(there), merges)
    scene = Scene(graph, chains, usage, _rooms_of(graph), options, now_ns)
    left_out = (*places.left_out, *lost, *survey.left_out, *not_searched)
    report = replace(
        _report(scene, openers, places.named, left_out),
        scope=places.named if domains is None else (*_named_apart(places, paths, there), LIBVIRT),
    )
    if not options.history:
        return report
    line = line_of_scan(report, scene, time.monotonic() - began)
    earlier = scans_of(line.places)
    add_scan(line)
    return replace(report, forecasts=forecasts((*earlier, line), options.length_limit))


def _named_apart(
    places: Places, paths: Sequence[str | Path], disks: Sequence[str]
) -> Iterator[str]:
    """Places that were named, and not only as the disk of a domain."""
    named, of_domains = ({os.path.abspath(one) for one in several} for several in (paths, disks))  # noqa: PTH100
    return (place for place in places.named if place not in of_domains - named)


def _open_ones(graph: ImageGraph, openers: Openers) -> Iterator[Identity]:
    is_open = {str(path) for path, processes in openers.processes.items() if processes}
    return (image.identity for image in graph.images.values() if image.path in is_open)


class _Survey:
    """Reads images, and those that they stand on."""

    def __init__(
        self, places: Places, access: Access, memory: Memory, on_progress: OnProgress
    ) -> None:
        policy = ChainPolicy(allow_backing=tuple(map(Path, access.allow_backing)))
        allowed = allowed_places_of(map(Path, places.loose), policy)
        self._surveyor = Surveyor(allowed, Directories())
        self._files = places.files
        self._access = access
        self._memory = memory
        self._on_progress = on_progress
        self.left_out: list[str] = []

    def images(self) -> Iterator[FoundImage]:
        """All of them, each once."""
        known: dict[Identity, FoundImage] = {}
        for number, path in enumerate(self._files):
            self._tell(number)
            image = self._named(path, known)
            if image is not None:
                known[image.identity] = image
                self._tell_of_bitmaps(image)
                yield image
        pending = list(known.values())
        while pending:
            image = self._below(pending.pop(), known)
            if image is not None:
                known[image.identity] = image
                pending.append(image)
                yield image
        self._tell(len(self._files))

    def checked(self, graph: ImageGraph, in_use: frozenset[Identity]) -> Iterator[FoundImage]:
        """The same images, with the refcounts of those checked that nobody has open."""
        for number, image in enumerate(graph.images.values()):
            self._tell(number)
            if image.identity in in_use or image.content.problem or not image.content.cluster_size:
                yield image
                continue
            try:
                content = image_content(image.path, thoroughly=True)
            except ChainmergeError as error:
                content = replace(image.content, problem=problem_of(error))
            if content is None or not _is_still(image):
                # Somebody writes to it, so what was found may mean nothing.
                yield image
                continue
            yield replace(image, content=content)

    def chains(self, graph: ImageGraph) -> Iterator[tuple[Identity, ChainFacts]]:
        """What is in the chain of each leaf."""
        total = len(graph.leaves)
        for number, leaf in enumerate(graph.leaves):
            if number % _TOLD_EVERY == 0:
                self._on_progress(ProgressEvent(Stage.CHAINS, done=number, total=total))
            yield leaf.identity, self._facts(graph, leaf)
        self._on_progress(ProgressEvent(Stage.CHAINS, done=total, total=total))

    def _facts(self, graph: ImageGraph, leaf: FoundImage) -> ChainFacts:
        line = list(graph.down_from(leaf))
        identities = [image.identity for image in reversed(line)]
        first = first_own_index(identities, graph.users)
        key = key_of_chain(line, first, self._access)
        known = self._memory.facts(key)
        if known is not None:
            return known
        facts = chain_facts(Path(leaf.path), self._access, graph.users)
        if [member.identity for member in facts.members] != identities:
            return facts
        if facts.base is not None:
            # By the name that it was found by, not by the way down from the leaf.
            facts = replace(facts, base=graph.images[identities[first]].path)
        self._memory.keep_facts(key, line, facts)
        return facts

    def _tell(self, number: int) -> None:
        total = len(self._files)
        if number % _TOLD_EVERY == 0 or number == total:
            self._on_progress(ProgressEvent(Stage.IMAGES, done=min(number, total), total=total))

    def _named(self, path: str, known: dict[Identity, FoundImage]) -> FoundImage | None:
        try:
            stamp = stamp_of(path)
        except OSError:
            # It is gone, or a link that leads nowhere.
            return None
        if stamp is None or stamp.identity in known:
            return None
        try:
            content = self._content(path, stamp)
        except ChainmergeError as error:
            if path.endswith(_IMAGE_SUFFIXES):
                content = ImageContent(ImageFormat.QCOW2, problem=problem_of(error))
            else:
                # What nobody can read may be anything.
                self._leave_out(error.sentence)
                return None
        if content is None:
            return None
        return as_found(path, stamp, content, self._surveyor, named=True)

    def _content(self, path: str, stamp: Stamp) -> ImageContent | None:
        """Raises ChainmergeError."""
        known = self._memory.content(stamp)
        if known is not None:
            return known
        content = image_content(path, thoroughly=False)
        if content is not None:
            self._memory.keep_content(stamp, content)
        return content

    def _below(self, image: FoundImage, known: dict[Identity, FoundImage]) -> FoundImage | None:
        """The image that one stands on, if it is not known yet and may be looked at."""
        link = image.link
        if link is None or link.problem is not None or link.path is None:
            return None
        path = str(without_detours(link.path))
        try:
            stamp = stamp_of(path)
        except (OSError, ValueError):
            return None
        if stamp is None or stamp.identity in known or stamp.identity not in link.identities:
            return None
        content = content_below(path, image.content.backing_format, stamp.size)
        return as_found(path, stamp, content, self._surveyor, named=False)

    def _tell_of_bitmaps(self, image: FoundImage) -> None:
        if image.content.unread_bitmaps:
            count = counted(image.content.unread_bitmaps, "bitmap")
            self._leave_out(f"{image.path} has {count}, which were not looked at")

    def _leave_out(self, sentence: str) -> None:
        if len(self.left_out) < _MOST_LEFT_OUT:
            self.left_out.append(sentence)


def _is_still(image: FoundImage) -> bool:
    """Whether an image is what it was when it was found."""
    try:
        return stamp_of(image.path) == image.stamp
    except OSError:
        return False


def _disks_that_are_there(domains: Iterable[DefinedDisk]) -> tuple[list[str], list[str]]:
    """The paths of disks, and what is to be said of those that are not there."""
    there, lost = [], []
    for disk in domains:
        try:
            os.stat(disk.path)  # noqa: PTH116
        except (OSError, ValueError):
            lost.append(f"{disk.path}, disk {disk.target} of domain {disk.domain}, is not there")
        else:
            there.append(disk.path)
    return there, lost


def _identities_at(paths: Iterable[str]) -> frozenset[Identity]:
    found = set()
    for path in paths:
        try:
            found.add(identity_of(os.stat(path)))  # noqa: PTH116
        except OSError:
            continue
    return frozenset(found)


def _merges_in(places: Places) -> tuple[tuple[UnfinishedMerge, ...], tuple[str, ...]]:
    """Unfinished merges of which something was seen, or which are about devices.

    And what was not looked at for that.
    """
    has_devices = any(path.startswith("/dev/") for path in (*places.loose, *places.named))
    records = {*places.records, *((STATE_DIRECTORY,) if has_devices else ())}
    # What is below another one is looked at with it.
    highest = [place for place in records if records.isdisjoint(place.parents) and place.is_dir()]
    if not highest:
        return (), ()
    try:
        report = status(sorted(highest))
    except ChainmergeError as error:
        return (), (f"unfinished merges are not known: {error.sentence}",)
    return report.merges, report.not_searched


def _rooms_of(graph: ImageGraph) -> dict[int, FileSystemRoom]:
    rooms: dict[int, FileSystemRoom] = {}
    for image in graph.images.values():
        device = image.stamp.device
        if image.stamp.is_device or device in rooms:
            continue
        try:
            found = os.statvfs(os.path.realpath(image.path))
        except OSError:
            continue
        rooms[device] = FileSystemRoom(
            found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
        )
    return rooms


def _report(
    scene: Scene, openers: Openers, places: tuple[str, ...], left_out: tuple[str, ...]
) -> ScanReport:
    graph = scene.graph
    unfinished = images_of_merges(scene.usage.merges)
    users = {str(path): users_of(path, openers) for path in openers.processes}
    nobody = () if openers.all_seen else None
    chains = [
        summary_of(Path(leaf.path), scene.chains[leaf.identity], openers, unfinished)
        for leaf in graph.leaves
    ]
    return ScanReport(
        version=REPORT_VERSION,
        scanned_at=scene.now_ns // _NANOSECONDS,
        places=places,
        images=tuple(
            _scanned(scene, image, users.get(image.path, nobody))
            for image in sorted(graph.images.values(), key=lambda image: image.path)
        ),
        chains=tuple(sorted(chains, key=most_freed_first)),
        findings=find_all(scene),
        occupied_bytes=sum(image.stamp.occupied for image in graph.images.values()),
        freed_bytes=sum(chain.freed_bytes or 0 for chain in chains),
        left_out=left_out,
    )


def _scanned(scene: Scene, image: FoundImage, users: tuple[ImageUser, ...] | None) -> ScannedImage:
    stamp, content = image.stamp, image.content
    base = scene.graph.base_of(image)
    return ScannedImage(
        path=image.path,
        format=content.format,
        virtual_size=content.virtual_size,
        file_size=stamp.size,
        occupied_bytes=None if stamp.is_device else stamp.occupied,
        written_at=None if stamp.is_device else stamp.written_ns // _NANOSECONDS,
        backing=content.backing_name,
        parent=None if base is None else base.path,
        children=len(scene.graph.children_of(image)),
        depth=scene.graph.depths[image.identity],
        bitmaps=tuple(
            ScannedBitmap(
                one.name, str(one.state), one.granularity, one.stored_bytes, one.tombstone
            )
            for one in content.bitmaps
        ),
        snapshots=content.snapshots,
        users=users,
        may_be_stale=not scene.is_idle(image),
        problem=None if content.problem is None else content.problem.sentence,
    )
