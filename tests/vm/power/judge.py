# SPDX-License-Identifier: Apache-2.0
"""Says whether a state is one in which a power cut may leave the images of a merge."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

from chainmerge.chain.layers import Layer, layer_of_qcow2, layer_of_raw
from chainmerge.chain.view import GuestView
from chainmerge.qcow2.bitmaps import BitmapFlag, read_bits, read_directory
from chainmerge.qcow2.bits import BitSet
from chainmerge.qcow2.check import check
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.readable import BytesReadable
from tests.support import qemu
from tests.support.loopdev import loop_device, mounted
from tests.vm.commands import chainmerge_forked
from tests.vm.power.log_writes import SECTOR, states
from tests.vm.power.media import FileMedium, MemoryMedium
from tests.vm.power.physical_volume import NoMetadata, volumes_on
from tests.vm.power.recordings import mount_point_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.vm.power.cases import PowerCase
    from tests.vm.power.log_writes import Entry, Medium, State

# What QEMU takes unless told: a cluster, but no less than this.
_LEAST_GRANULARITY: Final = 4096
DONE: Final = "done"
# Every so many states are looked at by QEMU, and the command is run again on a copy.
_QEMU_SAMPLE: Final = 12
_RERUN_SAMPLE: Final = 12

Bitmaps = dict[str, tuple[BitSet, BitmapFlag]]


@dataclass(frozen=True)
class Images:
    """The images of a chain as they are in one state, by name."""

    contents: Mapping[str, bytes]
    raw: frozenset[str]

    def view(self, name: str) -> bytes:
        """What a guest sees of an image and what it says it stands on."""
        layers: list[Layer] = []
        at: str | None = name
        while at is not None:
            readable = BytesReadable(at, self.contents[at])
            if at in self.raw:
                layers.append(layer_of_raw(readable))
                break
            image = Qcow2Image(readable)
            layers.append(layer_of_qcow2(image, readable))
            backing = image.header.backing_name
            at = None if backing is None else Path(backing).name
        view = GuestView(tuple(reversed(layers)))
        return view.read(0, view.virtual_size)

    def bitmaps(self, name: str) -> Bitmaps:
        """What a reader finds that ignores bitmaps without the autoclear bit, as QEMU does."""
        if name in self.raw:
            return {}
        image = self.image(name)
        if not image.header.bitmaps_trusted:
            return {}
        entries = read_directory(image)
        return {entry.name: (read_bits(image, entry), entry.flags) for entry in entries}

    def image(self, name: str) -> Qcow2Image:
        return Qcow2Image(BytesReadable(name, self.contents[name]))

    def root(self, name: str) -> bytes:
        """What a switch is one write of."""
        return self.contents[name][:SECTOR]

    def assert_sound(self) -> None:
        """Fail if an image is corrupt. Leaks are allowed."""
        for name in self.contents.keys() - self.raw:
            image = self.image(name)
            assert not image.header.dirty, name
            assert not image.header.corrupt, name
            report = check(image)
            assert report.sound, (name, report)

    def write_to(self, directory: Path) -> None:
        for name, content in self.contents.items():
            (directory / name).write_bytes(content)


class Judge(ABC):
    """Looks at every state of one recording."""

    medium: Medium

    def __init__(
        self, case: PowerCase, log: Sequence[Entry], directory: Path, *, thorough: bool
    ) -> None:
        self.case = case
        self.counts: Counter[str] = Counter()
        self._log = log
        self._directory = directory
        self._qemu_sample = 1 if thorough else _QEMU_SAMPLE
        self._rerun_sample = 3 if thorough else _RERUN_SAMPLE

    @abstractmethod
    def images(self) -> Images | None:
        """What the medium holds now; None where nobody finds the volumes or files."""

    @abstractmethod
    def final_images(self) -> Images:
        """What it holds in the end."""

    @contextmanager
    @abstractmethod
    def working_copy(self, images: Images) -> Iterator[Path]:
        """A directory with the images as they are now, to run the command in again."""

    def can_run_again(self, images: Images) -> bool:
        """Whether the state has all that a rerun would have in it."""
        del images
        return True

    @property
    def command_again(self) -> Sequence[str]:
        """What finishes it, and leaves nothing marked used that is not."""
        return self.case.command

    @cached_property
    def before(self) -> Images:
        found = self.images()
        assert found is not None
        return found

    @cached_property
    def final(self) -> Images:
        return self.final_images()

    @cached_property
    def seen(self) -> bytes:
        """What the guest sees, before, after and at every moment between."""
        return self.before.view(self.case.leaf.name)

    @cached_property
    def merged(self) -> bytes:
        """What the result alone shows in the end."""
        return self.before.view("top") if self.case.command[0] == "merge" else self.alone

    @cached_property
    def alone(self) -> bytes:
        """What the result alone shows before."""
        return self.before.view(self.case.result)

    @cached_property
    def new_bitmaps(self) -> Bitmaps:
        size = len(self.final.view(self.final_name)) if self.case.dirty else 0
        return {
            name: (BitSet.from_ranges(ranges, size, self._granularity(name)), BitmapFlag.AUTO)
            for name, ranges in self.case.dirty.items()
        }

    def _granularity(self, name: str) -> int:
        """The finest of those that a bitmap has in the images that have it."""
        sizes = (
            self.before.image(image.name).header.cluster_size
            for image in self.case.images
            if name in (*image.bitmaps, *image.stale)
        )
        return max(_LEAST_GRANULARITY, min(sizes))

    @property
    def final_name(self) -> str:
        return self.case.final_name or self.case.result

    def judge(self, state: State) -> None:
        """Fail unless nothing is lost in the state that the medium is in."""
        images = self.images()
        if images is None:
            # LVM writes the text and what leads to it without a flush between the two, and ext4
            # a superblock of two sectors with one checksum.
            self.counts["with LVM's or the file system's own metadata torn"] += 1
            assert "random part" in state.label, state
            return
        self.counts["states"] += 1
        self._assert_allowed(images, state)
        if state.number % self._qemu_sample == 1 % self._qemu_sample:
            self._ask_qemu(images, state)
        if state.number % self._rerun_sample == 0 and self.can_run_again(images):
            self._assert_rerun_completes(images, state)

    def assert_all_was_met(self) -> None:
        """Fail unless both the old and the new image were among the states."""
        assert self.counts["new image"], self.counts
        assert self.counts["old image"], self.counts
        if self.case.ballast:
            assert self.counts["old image without stale bitmaps"], self.counts

    def summary(self) -> str:
        return ", ".join(f"{count} {what}" for what, count in self.counts.items() if count)

    def _assert_allowed(self, images: Images, state: State) -> None:
        images.assert_sound()
        leaf = self.case.leaf.name
        name = self._name_of_result(images)
        assert images.view(leaf if leaf in images.contents else name) == self.seen, state
        is_new = images.root(name) == self.final.root(self.final_name)
        if name in images.raw:
            is_new = images.view(name) == self.merged
        self.counts["new image" if is_new else "old image"] += 1
        found = images.bitmaps(name)
        if is_new:
            assert found == self.new_bitmaps, state
            assert images.view(name) == self.merged, state
        else:
            old = self.before.bitmaps(self.case.result)
            stale = self.case.image(self.case.result).stale
            pruned = {each: bits for each, bits in old.items() if each not in stale}
            assert found in (old, pruned), state
            self.counts["old image without stale bitmaps"] += bool(stale) and found == pruned
            if self.case.keeps_old:
                assert images.view(name) == self.alone, state
        if DONE in state.marks:
            self.counts["after the command's end"] += 1
            assert is_new, state
            assert images.contents.keys() == self.final.contents.keys(), state
            for each in images.contents.keys() - images.raw:
                assert self._backing(images, each) == self._backing(self.final, each), state

    def _name_of_result(self, images: Images) -> str:
        """Under which name the result is found: renamed, its old name is gone."""
        return self.case.result if self.case.result in images.contents else self.final_name

    @staticmethod
    def _backing(images: Images, name: str) -> str | None:
        return images.image(name).header.backing_name

    def _ask_qemu(self, images: Images, state: State) -> None:
        self.counts["seen by QEMU"] += 1
        place = self._directory / "for-qemu"
        place.mkdir()
        images.write_to(place)
        # Once base has another name, QEMU cannot open what stood on it and is about to go.
        renamed = self.case.result not in images.contents
        unusable = frozenset(self.case.gone) if renamed else frozenset()
        for name in images.contents.keys() - images.raw - unusable:
            assert qemu.check(place / name)["corruptions"] == 0, (state, name)
        leaf = self.case.leaf.name
        if leaf in images.contents:
            assert qemu.content(place / leaf) == self.seen, state
        shutil.rmtree(place)

    def _assert_rerun_completes(self, images: Images, state: State) -> None:
        self.counts["finished by a rerun"] += 1
        with self.working_copy(images) as place:
            paths = {image.name: str(place / image.name) for image in self.case.images}
            words = [word.format_map(paths) for word in self.command_again]
            ran = chainmerge_forked(*words)
            assert ran.status == 0, (state, words, ran)
            leaf = self.case.leaf.name
            leaf = leaf if (place / leaf).exists() else self.final_name
            assert qemu.content(place / leaf) == self.seen, state
            names = [image.name for image in self.case.images if (place / image.name).exists()]
            assert set(names) == set(self.final.contents), state
            after = Images({each: (place / each).read_bytes() for each in names}, images.raw)
            assert after.view(self.final_name) == self.merged, state
            assert after.bitmaps(self.final_name) == self.new_bitmaps, state
            if self.final_name in images.raw:
                return
            report = qemu.check(place / self.final_name)
            assert report["corruptions"] == 0, (state, report)
            # Pruning again finds nothing to do; what an earlier run leaked is for `repair`.
            assert report["leaks"] == 0 or self.case.command[0] != "merge", (state, report)


def _raw_images(case: PowerCase) -> frozenset[str]:
    return frozenset(image.name for image in case.images if image.options is None)


class VolumesJudge(Judge):
    """Of a merge on logical volumes: the medium is their physical volume."""

    def __init__(
        self,
        case: PowerCase,
        medium: MemoryMedium,
        log: Sequence[Entry],
        directory: Path,
        *,
        thorough: bool,
    ) -> None:
        super().__init__(case, log, directory, thorough=thorough)
        self.medium: MemoryMedium = medium
        self._initial = medium.copy()

    def images(self) -> Images | None:
        return self._images_on(self.medium)

    def final_images(self) -> Images:
        medium = self._initial.copy()
        for _ in states(medium, self._log, subsets=0, seed=0):
            pass
        found = self._images_on(medium)
        assert found is not None
        return found

    def can_run_again(self, images: Images) -> bool:
        # That a pull is done, and which names base did not have before a range was merged into
        # it, is noted in /var/lib, which is on none of the volumes.
        # So is what was recorded before a volume was removed or renamed.
        if len(images.contents) < len(self.case.images):
            return False
        is_new = images.root(self.case.result) == self.final.root(self.final_name)
        spans_levels = "--base" in self.case.command
        return not (is_new and ("pull" in self.case.command or spans_levels))

    @property
    def command_again(self) -> Sequence[str]:
        # The journal, which alone tells whose the leaked clusters are, is in /var/lib as well.
        program, *words = self.case.command
        return (program, "--reclaim", *words) if program == "merge" else self.case.command

    def _images_on(self, medium: MemoryMedium) -> Images | None:
        try:
            volumes = volumes_on(medium)
        except NoMetadata:
            return None
        names = [image.name for image in self.case.images if image.name in volumes]
        contents = {name: volumes[name].content(medium) for name in names}
        return Images(contents, _raw_images(self.case))

    @contextmanager
    def working_copy(self, images: Images) -> Iterator[Path]:
        place = self._directory / "rerun"
        place.mkdir()
        images.write_to(place)
        yield place
        shutil.rmtree(place)


class FilesJudge(Judge):
    """Of a merge of files: the medium is the device of their file system."""

    def __init__(
        self,
        case: PowerCase,
        medium: FileMedium,
        log: Sequence[Entry],
        directory: Path,
        *,
        thorough: bool,
    ) -> None:
        super().__init__(case, log, directory, thorough=thorough)
        self.medium: FileMedium = medium
        self._initial = directory / "initial"
        qemu.run("cp", "--sparse=always", medium.path, self._initial)

    def images(self) -> Images | None:
        try:
            return self._images_on(self.medium.path)
        except qemu.ToolFailed as error:
            if "mount" in str(error):
                return None
            raise

    def final_images(self) -> Images:
        medium = FileMedium(self._initial)
        for _ in states(medium, self._log, subsets=0, seed=0):
            pass
        medium.close()
        return self._images_on(self._initial)

    def _images_on(self, device: Path) -> Images:
        with self._mounted_copy(device) as place:
            names = [image.name for image in self.case.images if (place / image.name).exists()]
            contents = {name: (place / name).read_bytes() for name in names}
        return Images(contents, _raw_images(self.case))

    @contextmanager
    def working_copy(self, images: Images) -> Iterator[Path]:
        del images
        with self._mounted_copy(self.medium.path) as place:
            yield place

    @contextmanager
    def _mounted_copy(self, device: Path) -> Iterator[Path]:
        """A file system as it comes back after a power cut: mounting replays its journal."""
        copy, place = self._directory / "copy", mount_point_of(self.case)
        qemu.run("cp", "--sparse=always", device, copy)
        place.mkdir(exist_ok=True)
        size = copy.stat().st_size
        with loop_device(copy, size) as loop, mounted("-t", self.case.storage, loop, place):
            yield place
