# SPDX-License-Identifier: Apache-2.0
"""A life of virtual disks: what people and programs do to them, and what must be true of it.

:class:`Life` does each step on real images and keeps a model beside them: what the guest of each
disk has written, what its snapshots show, and since when its checkpoints record. After each step
everything is looked at through QEMU. The model does not foretell which commands succeed. It knows
what may not happen: that a guest sees other data than it wrote, that a checkpoint misses a write,
that a command which refuses has changed something.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shlex
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from chainmerge.storage.errors import ImageMissing
from tests.lifecycle.commands import KILLED, carry_out
from tests.merging.test_faults import chain_of, checkpoints_of
from tests.support.live_vm import running_vm
from tests.support.qemu import ToolFailed, create, qemu_img, qemu_io

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from chainmerge.qcow2.bits import BitSet
    from tests.lifecycle.commands import Ended
    from tests.lifecycle.storage import Storage

GRANULE: Final = 64 << 10
"""Bytes that the guest writes at a time."""
DISK_GRANULES: Final = 20
MOST_GRANULES: Final = 32
MOST_DISKS: Final = 3
NAMES: Final = "abcdefgh"

Content = tuple[int, ...]
"""The byte that each granule is full of."""


class LifeViolated(AssertionError):
    """What must be true is not."""


@dataclass
class Disk:
    """A guest's disk: where it is, and what the guest knows of it."""

    leaf: Path
    content: Content
    written_since: dict[str, set[int]] = field(default_factory=dict)
    """By checkpoint, the granules that the guest wrote since."""


@dataclass
class Backup:
    """Copies of a disk's whole chain, and what was true then."""

    disk: Disk
    copies: dict[Path, Path]
    shows: dict[Path, list[Content]]
    snapshots: dict[tuple[Path, str], Content]


@dataclass(frozen=True)
class Step:
    """One thing that happens; *pick* and *flags* choose among what is possible then."""

    kind: str
    pick: int = 0
    flags: int = 0
    dies_at: int | None = None


@dataclass(frozen=True)
class _Range:
    """What a merge is about, as the images are when it begins."""

    top: Path
    base: Path
    between: tuple[Path, ...]
    pulls: bool
    keeps_name: bool

    @property
    def doomed(self) -> set[Path]:
        """What may go: with ``--delete``, and base's name where it gets that of top."""
        return {*self.between, self.base if self.pulls or self.keeps_name else self.top}


class Life:
    """Some disks, and what has happened to them so far."""

    def __init__(self, storage: Storage, scratch: Path) -> None:
        self.storage = storage
        self.scratch = scratch
        self.state = scratch / "state"
        self.disks: list[Disk] = []
        self.shows: dict[Path, list[Content]] = {}
        """What images show that no guest writes to; more than one thing after a kill."""
        self.snapshots: dict[tuple[Path, str], Content] = {}
        self.commands: list[list[str]] = []
        self.doomed: set[Path] = set()
        """Images that some command was asked to delete, and that were not made since."""
        self.backups: list[Backup] = []
        self.happened: Counter[str] = Counter()
        self.story: list[str] = []
        self._value = 0
        self._number = 0

    # What there is to choose from.

    def _free_name(self) -> Path | None:
        for name in NAMES:
            place = self.storage.directory / name
            if not self._in_use(place):
                self.doomed.discard(place)
                return self.storage.place(name)
        return None

    def _in_use(self, place: Path) -> bool:
        if self.storage.deletes:
            return self.storage.holds(place)
        known = self._all_paths()
        return place in known | {image for path in known for image in _chain_or_nothing(path)}

    def _pick(self, step: Step) -> Disk:
        return self.disks[step.pick % len(self.disks)]

    def _is_alone(self, disk: Disk) -> bool:
        """Whether no other image stands on one of the disk's images."""
        own = chain_of(disk.leaf)
        others = {
            image
            for path in {other.leaf for other in self.disks if other is not disk} | set(self.shows)
            if path not in own
            for image in chain_of(path)
        }
        return not others & set(own)

    # Steps. Each returns whether it was possible.

    def do(self, step: Step) -> None:
        """Do a step, if it is possible, and look at everything."""
        try:
            done = getattr(self, f"_{step.kind}")(step)
            if done:
                self.happened[step.kind] += 1
            self.check()
        except (ImageMissing, AssertionError) as error:
            raise LifeViolated(f"something that a guest needs cannot be read: {error}") from error

    def new_disk(self) -> None:
        """A machine is installed."""
        image = self._free_name()
        if image is None or len(self.disks) >= MOST_DISKS:
            return
        self._say(f"create {image.name}")
        create(image, DISK_GRANULES * GRANULE)
        disk = Disk(image, (0,) * DISK_GRANULES)
        self.disks.append(disk)
        self._guest_writes(disk, 0, DISK_GRANULES // 2)

    def _new_disk(self, step: Step) -> bool:
        del step
        before = len(self.disks)
        self.new_disk()
        return len(self.disks) > before

    def _write(self, step: Step) -> bool:
        disk = self._pick(step)
        start = step.flags % len(disk.content)
        self._guest_writes(disk, start, 1 + step.flags % 3)
        return True

    def _guest_writes(self, disk: Disk, start: int, count: int) -> None:
        stop = min(start + count, len(disk.content))
        self._value = self._value % 250 + 1
        value = 0 if self._value % 7 == 0 else self._value
        self._say(f"guest of {disk.leaf.name} writes {value} to {start}..{stop - 1}")
        command = "write -z" if value == 0 else f"write -P {value}"
        qemu_io(disk.leaf, f"{command} {start * GRANULE} {(stop - start) * GRANULE}")
        written = range(start, stop)
        disk.content = tuple(
            value if index in written else old for index, old in enumerate(disk.content)
        )
        for since in disk.written_since.values():
            since.update(written)
        self._forget_views_through(disk.leaf)

    def _forget_views_through(self, image: Path) -> None:
        """Of images that stand on one which is written to, nobody promises anything."""
        for path in [path for path in self.shows if path != image]:
            if image in _chain_or_nothing(path):
                self._forget(path)
        for path, name in list(self.snapshots):
            if path != image and image in _chain_or_nothing(path):
                del self.snapshots[path, name]
        self.shows.pop(image, None)

    def _forget(self, path: Path) -> None:
        self.shows.pop(path, None)
        for key in [key for key in self.snapshots if key[0] == path]:
            del self.snapshots[key]

    def _snapshot(self, step: Step) -> bool:
        disk, image = self._pick(step), self._free_name()
        if image is None:
            return False
        names = [name for name in checkpoints_of(disk.leaf) if name in disk.written_since]
        self._say(f"snapshot of {disk.leaf.name}: {image.name}, with {names}")
        create(image, backing=disk.leaf.name)
        for name in names:
            qemu_img("bitmap", "--add", image, name)
        self.shows[disk.leaf] = [disk.content]
        disk.leaf = image
        return True

    def _checkpoint(self, step: Step) -> bool:
        disk = self._pick(step)
        self._number += 1
        name = f"day-{self._number}"
        self._say(f"checkpoint {name} in {disk.leaf.name}")
        qemu_img("bitmap", "--add", disk.leaf, name)
        disk.written_since[name] = set()
        return True

    def _drop_checkpoint(self, step: Step) -> bool:
        """A backup program that forgets the images below the active one."""
        disk = self._pick(step)
        passing = sorted(set(checkpoints_of(disk.leaf)) & disk.written_since.keys())
        if not passing:
            return False
        name = passing[step.flags % len(passing)]
        self._say(f"checkpoint {name} is removed from {disk.leaf.name} only")
        qemu_img("bitmap", "--remove", disk.leaf, name)
        del disk.written_since[name]
        return True

    def _branch(self, step: Step) -> bool:
        known = sorted(path for path, contents in self.shows.items() if len(contents) == 1)
        image = self._free_name()
        if not known or image is None or len(self.disks) >= MOST_DISKS:
            return False
        below = known[step.flags % len(known)]
        self._say(f"another disk on {below.name}: {image.name}")
        create(image, backing=below.name)
        self.disks.append(Disk(image, self.shows[below][0]))
        return True

    def _internal_snapshot(self, step: Step) -> bool:
        disk = self._pick(step)
        name = f"keep-{len(self.snapshots)}"
        if (disk.leaf, name) in self.snapshots:
            return False
        self._say(f"internal snapshot {name} in {disk.leaf.name}")
        qemu_img("snapshot", "-c", name, disk.leaf)
        self.snapshots[disk.leaf, name] = disk.content
        return True

    def _resize(self, step: Step) -> bool:
        disk = self._pick(step)
        if len(disk.content) + 4 > MOST_GRANULES or self._has_snapshots(disk.leaf):
            return False
        self._say(f"{disk.leaf.name} grows")
        qemu_img("resize", "-q", disk.leaf, f"+{4 * GRANULE}")
        disk.content += (0,) * 4
        self._forget_views_through(disk.leaf)
        return True

    def _has_snapshots(self, image: Path) -> bool:
        return any(path == image for path, _ in self.snapshots)

    def _rename(self, step: Step) -> bool:
        disk, image = self._pick(step), self._free_name()
        if not self.storage.deletes or image is None or self._stands_below_others(disk.leaf):
            return False
        self._say(f"{disk.leaf.name} is renamed to {image.name}")
        disk.leaf.rename(image)
        for path, name in list(self.snapshots):
            if path == disk.leaf:
                self.snapshots[image, name] = self.snapshots.pop((path, name))
        disk.leaf = image
        return True

    def _stands_below_others(self, image: Path) -> bool:
        paths = {disk.leaf for disk in self.disks} | set(self.shows)
        return any(image in chain_of(path)[1:] for path in paths)

    def _revert(self, step: Step) -> bool:
        """The active overlay is deleted, and another one created under its name."""
        disk = self._pick(step)
        chain = chain_of(disk.leaf)
        if len(chain) < 2 or self._stands_below_others(disk.leaf):
            return False
        contents = self.shows.get(chain[1], [])
        if len(contents) != 1:
            return False
        self._say(f"{disk.leaf.name} is deleted and created again on {chain[1].name}")
        self._forget(disk.leaf)
        if self.storage.deletes:
            disk.leaf.unlink()
        create(disk.leaf, backing=chain[1].name)
        self.doomed.discard(disk.leaf)
        disk.content, disk.written_since = contents[0], {}
        return True

    def _back_up(self, step: Step) -> bool:
        disk = self._pick(step)
        if not self._is_alone(disk) or len(self.backups) >= 3:
            return False
        chain = chain_of(disk.leaf)
        self._say(f"backup of {[image.name for image in chain]}")
        directory = Path(tempfile.mkdtemp(dir=self.scratch))
        copies = {}
        for image in chain:
            copies[image] = directory / image.name
            shutil.copyfile(image, copies[image])
        own = {path: list(self.shows[path]) for path in chain if path in self.shows}
        snapshots = {key: shown for key, shown in self.snapshots.items() if key[0] in chain}
        self.backups.append(Backup(copy.deepcopy(disk), copies, own, snapshots))
        return True

    def _restore(self, step: Step) -> bool:
        """The images come back from a backup; files of the program stay where they are."""
        if not self.backups:
            return False
        backup = self.backups[step.pick % len(self.backups)]
        taken = {image for image in backup.copies if self._in_use(image)}
        doomed = [
            disk for disk in self.disks if taken & set(chain_of(disk.leaf)) and self._is_alone(disk)
        ]
        owned = {image for disk in doomed for image in chain_of(disk.leaf)}
        if taken - owned or len(doomed) != 1:
            return False
        self._say(f"restore of {sorted(image.name for image in backup.copies)}")
        for image in owned | set(backup.copies):
            self._forget(image)
        if self.storage.deletes:
            for image in owned - set(backup.copies):
                image.unlink()
        self.doomed -= set(backup.copies)
        for image, source in backup.copies.items():
            self.storage.put(source, image, same_inode=bool(step.flags % 2))
        self.disks.remove(doomed[0])
        self.disks.append(copy.deepcopy(backup.disk))
        self.shows |= copy.deepcopy(backup.shows)
        self.snapshots |= backup.snapshots
        return True

    def _renumber(self, step: Step) -> bool:
        del step
        self._say("volumes are detached, and attached under other numbers")
        self.storage.renumber()
        return not self.storage.deletes

    def _foreign_commit(self, step: Step) -> bool:
        """Somebody commits the active overlay by hand, and the guest goes on in base."""
        disk = self._pick(step)
        chain = chain_of(disk.leaf)
        if len(chain) < 2 or self._stands_below_others(disk.leaf):
            return False
        base = chain[1]
        others = [path for path in self._all_paths() if path not in chain]
        if any(base in _chain_or_nothing(path) for path in others):
            return False
        self._say(f"qemu-img commit of {disk.leaf.name}, the guest goes on in {base.name}")
        qemu_img("commit", "-q", "-d", disk.leaf)
        self._forget(disk.leaf)
        self.shows.pop(base, None)
        disk.leaf = base
        if len(disk.content) < len(self._seen(base)):
            disk.content += (0,) * (len(self._seen(base)) - len(disk.content))
        return True

    def _all_paths(self) -> set[Path]:
        return (
            {disk.leaf for disk in self.disks}
            | set(self.shows)
            | {path for path, _ in self.snapshots}
        )

    # Commands.

    def _merge(self, step: Step) -> bool:
        disk = self._pick(step)
        chain = chain_of(disk.leaf)
        if len(chain) < 2:
            return False
        flags = step.flags
        top = flags % (len(chain) - 1)
        base = top + 1 if flags % 3 else top + 1 + flags // 5 % (len(chain) - 1 - top)
        words = ["merge", "--json", *self._merge_flags(flags)]
        words += ["--base", str(chain[base]), "--", str(chain[top])]
        self._command(words, step.dies_at)
        return True

    def _merge_flags(self, flags: int) -> list[str]:
        words = []
        if flags // 2 % 3 == 1:
            words += ["--direction", "pull"]
        elif flags // 7 % 6 == 1:
            words += ["--engine", "qemu"]
        if self.storage.deletes and flags // 4 % 2:
            words.append("--delete")
            if flags // 8 % 4 == 1:
                words.append("--keep-name")
        if flags // 16 % 5 == 1:
            words += ["--verify", "metadata"]
        if flags // 32 % 4 == 1:
            words.append("--drop-snapshots")
        return words

    def _flatten(self, step: Step) -> bool:
        disk = self._pick(step)
        if len(chain_of(disk.leaf)) < 2:
            return False
        words = ["flatten", "--json"]
        if self.storage.deletes and step.flags % 2:
            words.append("--delete")
        self._command([*words, "--", str(disk.leaf)], step.dies_at)
        return True

    def _relink(self, step: Step) -> bool:
        """Somebody copies the backing file of a disk, and puts the disk on the copy."""
        disk = self._pick(step)
        chain = chain_of(disk.leaf)
        image = self._free_name()
        if len(chain) < 2 or image is None or chain[1] not in self.shows:
            return False
        self._say(f"{chain[1].name} is copied to {image.name}")
        self.storage.put(chain[1], image, same_inode=False)
        self.shows[image] = list(self.shows[chain[1]])
        words = ["relink", "--json", "--backing", str(image), str(disk.leaf)]
        self._command(words, step.dies_at)
        return True

    def _merge_disks(self, step: Step) -> bool:
        tops = [disk.leaf for disk in self.disks if len(chain_of(disk.leaf)) > 1]
        if len(tops) < 2:
            return False
        words = ["merge", "--json", *self._merge_flags(step.flags), "--", *map(str, tops)]
        self._command(words, step.dies_at)
        return True

    def _prune(self, step: Step) -> bool:
        disk = self._pick(step)
        if len(chain_of(disk.leaf)) < 2:
            return False
        self._command(["bitmaps", "prune", "--json", str(disk.leaf)], step.dies_at)
        return True

    def _again(self, step: Step) -> bool:
        if not self.commands:
            return False
        self._command(self.commands[step.pick % len(self.commands)], step.dies_at)
        return True

    def _status(self, step: Step) -> bool:
        """Ask what is unfinished, and type what is printed."""
        del step
        ended = self._run(["status", "--json", str(self.storage.directory)], None)
        if ended.status not in (0, 5):
            raise LifeViolated(f"status: {ended}")
        for merge in json.loads(ended.out.splitlines()[-1])["merges"]:
            if merge["command"]:
                program, *words = shlex.split(merge["command"])
                assert program == "chainmerge", merge["command"]
                # The live ones need a machine that runs.
                if words[0] != "live":
                    self._command([*words[:1], "--json", *words[1:]], None)
        return True

    def _repair(self, step: Step) -> bool:
        disk = self._pick(step)
        chain = chain_of(disk.leaf)
        image = chain[step.flags % len(chain)]
        self._command(["repair", "--yes", "--json", str(image)], step.dies_at)
        return True

    def _live_merge(self, step: Step) -> bool:
        disk = self._pick(step)
        chain = chain_of(disk.leaf)
        if len(chain) < 2:
            return False
        top = step.flags % (len(chain) - 1)
        with running_vm(self.scratch / "vm", list(reversed(chain))) as vm:
            words = ["live", "merge", "--json", *vm.arguments]
            if self.storage.deletes and step.flags // 4 % 2:
                words.append("--delete")
            words += ["--base", str(chain[top + 1]), "--", str(chain[top])]
            self._command(words, step.dies_at, then=vm.quit)
        return True

    def _command(
        self, words: list[str], dies_at: int | None, then: Callable[[], None] | None = None
    ) -> None:
        ranges = [one for top in _tops(words) if (one := _range(words, top)) is not None]
        passing = {id(disk): self._passing(disk) for disk in self.disks}
        before = self._digests()
        if "--delete" in words or "--keep-name" in words:
            self.doomed |= {image for one in ranges for image in one.doomed}
        ended = self._run(words, dies_at)
        self.happened[f"{' '.join(words[:2])[:10]} {ended.status}"] += 1
        if then is not None:
            then()
        if words not in self.commands and words[0] in ("merge", "flatten", "live", "bitmaps"):
            self.commands.append(words)
        if ended.status in (2, 3):
            # A machine that runs marks its images as it opens and closes them.
            if words[0] != "live":
                self._require_unchanged(before, words, ended)
            return
        for one in ranges:
            if one.keeps_name and not one.pulls and not self.storage.holds(one.base):
                self._rename_snapshots(one.base, one.top)
            elif "--drop-snapshots" in words:
                self._forget_dropped({one.top, *one.between})
        for one in ranges:
            self._follow(one, ended, words)
        self._forget_gone()
        if ended.status == 0 and words[0] in ("merge", "flatten", "relink"):
            for disk in self.disks:
                lost = passing[id(disk)] & disk.written_since.keys() - self._passing(disk)
                if lost:
                    raise LifeViolated(f"{words} has lost {lost} of {disk.leaf}")

    def _require_unchanged(self, before: dict[Path, str], words: list[str], ended: Ended) -> None:
        after = self._digests()
        changed = {path for path, digest in after.items() if before.get(path) != digest}
        changed |= before.keys() - after.keys()
        if changed:
            raise LifeViolated(f"exit {ended.status} of {words} has changed {changed}: {ended}")

    def _run(self, words: list[str], dies_at: int | None) -> Ended:
        moment = "" if dies_at is None else f" (killed at change {dies_at})"
        ended = carry_out(words, self.state, dies_at=dies_at)
        why = f" ({(ended.out or ended.err)[-200:]!r})" if ended.status == 1 else ""
        self._say(f"chainmerge {shlex.join(words)}{moment}: {ended.status}{why}")
        if "internal error" in ended.err or "internal-error" in ended.out:
            raise LifeViolated(f"{words}: {ended}")
        unfinished = (5,) if words[0] == "status" else ()
        if ended.status not in (0, 1, 2, 3, 4, *unfinished, 130, KILLED):
            raise LifeViolated(f"{words}: {ended}")
        return ended

    def _passing(self, disk: Disk) -> set[str]:
        return set(checkpoints_of(disk.leaf)) & disk.written_since.keys()

    def _digests(self) -> dict[Path, str]:
        images = [
            path
            for path in sorted(self.storage.directory.iterdir())
            if not path.name.startswith(".")
        ]
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in images}

    def _follow(self, one: _Range, ended: Ended, words: list[str]) -> None:
        """What the operator makes of how a merge ended: from which image he lets the guest run."""
        is_done = ended.status == 0 and '"already-merged"' not in ended.out
        disk = next((disk for disk in self.disks if disk.leaf == one.top), None)
        shown = [disk.content] if disk is not None else self.shows.get(one.top, [])
        if one.pulls:
            self._follow_up(one)
            return
        if disk is not None and not one.keeps_name:
            is_gone = not self.storage.holds(one.top)
            goes_down = words[0] == "live" or len(one.top.name + one.base.name) % 2
            if is_gone or (is_done and goes_down):
                self._say(f"  the guest goes on in {one.base.name}")
                disk.leaf = one.base
                self._fit(disk)
                self.shows.pop(one.base, None)
                self._forget_snapshotless(one.top)
            else:
                self._may_show(one.base, shown)
        elif one.base in self.shows and shown:
            self._may_show(one.base, shown)
        elif disk is None:
            # Nobody has looked at what goes down.
            self.shows.pop(one.base, None)
        if ended.status in (0, 1, 130, KILLED):
            for image in one.between:
                self.shows.pop(image, None)
        if ended.status != 0 and (words[0] == "live" or "qemu" in words):
            # QEMU writes below top, which hides what is half done.
            self._forget(one.base)
        if is_done and disk is None and one.base in self.shows and shown:
            self.shows[one.base] = list(shown)

    def _follow_up(self, one: _Range) -> None:
        """What a pull was told to delete is gone: who let his guest run from it takes top.

        The checkpoints that top has not got are no longer his.
        """
        for disk in self.disks:
            if disk.leaf in (*one.between, one.base) and not self.storage.holds(disk.leaf):
                self._say(f"  the guest goes on in {one.top.name}")
                disk.leaf = one.top
                there = checkpoints_of(one.top)
                disk.written_since = {
                    name: since for name, since in disk.written_since.items() if name in there
                }
                self.shows.pop(one.top, None)

    def _fit(self, disk: Disk) -> None:
        """A disk that is merged into a larger one is as large as that."""
        size = len(self._seen(disk.leaf))
        disk.content += (0,) * (size - len(disk.content))

    def _forget_snapshotless(self, image: Path) -> None:
        """An overlay that is left behind; only its snapshots are still somebody's."""
        self.shows.pop(image, None)

    def _forget_dropped(self, images: set[Path]) -> None:
        """Internal snapshots that a command was told to delete where it has to."""
        for image, name in list(self.snapshots):
            if image not in images:
                continue
            if self.storage.holds(image):
                is_gone = name not in qemu_img("snapshot", "-U", "-l", image).split()
            else:
                is_gone = image in self.doomed
            if is_gone:
                del self.snapshots[image, name]

    def _rename_snapshots(self, base: Path, top: Path) -> None:
        """Base has taken top's place, with its snapshots; those of top had to be told to go."""
        for key in [key for key in self.snapshots if key[0] == top]:
            del self.snapshots[key]
        for image, name in [key for key in self.snapshots if key[0] == base]:
            self.snapshots[top, name] = self.snapshots.pop((image, name))

    def _may_show(self, image: Path, contents: Iterable[Content]) -> None:
        if image in self.shows:
            known = self.shows[image]
            known += [content for content in contents if content not in known]

    def _forget_gone(self) -> None:
        """What was to be deleted may be gone; anything else that is gone will be missed."""
        for path in self.doomed:
            if not self.storage.holds(path):
                self.shows.pop(path, None)

    # What must be true.

    def check(self) -> None:
        """Look at everything that somebody relies on."""
        for disk in self.disks:
            found = self._seen(disk.leaf)
            if found != disk.content:
                raise LifeViolated(f"{disk.leaf} shows {found}, the guest wrote {disk.content}")
            self._check_checkpoints(disk)
        for path, contents in self.shows.items():
            found = self._seen(path)
            if not any(_same(found, content) for content in contents):
                raise LifeViolated(f"{path} shows {found}, not one of {contents}")
        for (path, name), content in self.snapshots.items():
            found = self._seen(path, "-l", name)
            if found != content:
                raise LifeViolated(f"snapshot {name} of {path} shows {found}, not {content}")

    def _check_checkpoints(self, disk: Disk) -> None:
        for name, bits in checkpoints_of(disk.leaf).items():
            dirty = set(_granules(bits))
            missing = disk.written_since.get(name, set()) - dirty
            if missing:
                raise LifeViolated(f"checkpoint {name} of {disk.leaf} lacks {missing}")

    def _seen(self, image: Path, *options: str) -> Content:
        """What QEMU shows of an image: the byte of each granule, -1 where there are several."""
        raw = self.scratch / "raw"
        chain_of(image)
        try:
            qemu_img("convert", "-U", *options, "-f", "qcow2", "-O", "raw", image, raw)
        except ToolFailed as error:
            raise LifeViolated(f"QEMU cannot read {image}: {error}") from error
        data = raw.read_bytes()
        raw.unlink()
        pieces = [data[at : at + GRANULE] for at in range(0, len(data), GRANULE)]
        return tuple(piece[0] if piece == piece[:1] * len(piece) else -1 for piece in pieces)

    def _say(self, sentence: str) -> None:
        self.story.append(sentence)


def _granules(bits: BitSet) -> Iterator[int]:
    for start, length in zip(*bits.ranges(), strict=True):
        yield from range(int(start) // GRANULE, (int(start + length) - 1) // GRANULE + 1)


def _same(found: Content, expected: Content) -> bool:
    """Whether a view is the expected one; base may be larger than what it holds."""
    shared = len(expected)
    return found[:shared] == expected and not any(found[shared:])


def _chain_or_nothing(path: Path) -> list[Path]:
    try:
        return chain_of(path)
    except Exception:  # an image that nobody relies on may be anything
        return []


def _tops(words: Sequence[str]) -> list[str]:
    return list(words[words.index("--") + 1 :]) if "--" in words else []


def _range(words: Sequence[str], top: str) -> _Range | None:
    """What a merge of *top* is about now; None where its chain cannot be followed."""
    chain = _chain_or_nothing(Path(top))
    flattens = words[0] == "flatten"
    pulls, keeps_name = flattens or "pull" in words, "--keep-name" in words
    bases = [words[index + 1] for index, word in enumerate(words) if word == "--base"]
    base = (chain[-1] if flattens else chain[1]) if len(chain) > 1 else None
    if bases:
        number = _tops(words).index(top) if len(bases) > 1 else 0
        base = Path(bases[number])
    if base is None:
        return None
    below = chain.index(base) if base in chain else len(chain)
    return _Range(Path(top), base, tuple(chain[1:below]), pulls, keeps_name)
