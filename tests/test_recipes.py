# SPDX-License-Identifier: Apache-2.0
"""The recipes in ``docs/recipes.md``, run as they are printed, on real images.

What the commands print has to be what stands below them, but for sizes, times, process numbers
and names of hosts. ``python -m tests.test_recipes`` writes it into the page.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.support.cli import environment
from tests.support.images import MIB
from tests.support.live_vm import running_vm
from tests.support.loopdev import mounted_file_system
from tests.support.operating import (
    break_bitmap,
    chain,
    installed,
    kill_while_copying,
    path_with,
)
from tests.support.qemu import assert_clean, create, qemu_io

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE: Final = Path(__file__).parents[1] / "docs" / "recipes.md"
_BLOCK: Final = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_DAY: Final = 86_400
_SEARCHED: Final = re.compile(r"\bsearched .*$", re.MULTILINE)
_ALONE: Final = ("unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")
_VARIES: Final = (
    (r"\d+(?:\.\d+)? (?:B|KiB|MiB|GiB|TiB)\b", "SIZE"),
    (r"\d+ bytes|\d+ more bytes", "BYTES"),
    (r"\d{4}-\d\d-\d\d \d\d:\d\d", "TIME"),
    (r"\d+(?:\.\d+)? s\b", "SECONDS"),
    (r"\bpid \d+ on \S+", "PID on HOST"),
    (r"\bpid \d+", "PID"),
    (r"\b\d{6,}\b", "NUMBER"),
    (r"  +", " "),
)


@dataclass(frozen=True)
class Place:
    """Where a recipe is tried, and what the page calls that: by the name, what it is here.

    ``seen_by`` starts a command: without sight of the VMs of others that run on this host.
    """

    images: Path
    called: dict[str, str]
    seen_by: tuple[str, ...] = _ALONE

    def here(self, text: str) -> str:
        said = re.compile("|".join(map(re.escape, self.called)))
        return said.sub(lambda name: self.called[name[0]], text)

    def said(self, text: str) -> str:
        for said, is_here in self.called.items():
            text = text.replace(is_here, said)
        text = text.replace(f" on {socket.gethostname()}\n", " on kvm1\n")
        # Where the VMs of this host have images is searched as well, and differs.
        return _SEARCHED.sub("searched 3 levels below /images", text)


def _place(images: Path, **called: str) -> Place:
    return Place(images, {"/images": str(images), **called})


@contextlib.contextmanager
def _chain_of_four(directory: Path) -> Iterator[Place]:
    chain(directory)
    yield _place(directory)


@contextlib.contextmanager
def _snapshots_of_days(directory: Path) -> Iterator[Place]:
    images = chain(directory, ["base", "mon", "tue", "wed", "thu", "fri", "active"])
    for number, image in enumerate(reversed(images[:-1]), start=1):
        written = time.time() - number * _DAY - 60
        os.utime(image, (written, written))
    create(directory / "clone.qcow2", backing="tue.qcow2")
    yield _place(directory)


@contextlib.contextmanager
def _several_chains(directory: Path) -> Iterator[Place]:
    for name, mib in (("web", 3), ("db", 8), ("mail", 2)):
        chain(directory, [f"{name}-base", f"{name}-snap", name], mib)
        qemu_io(directory / f"{name}.qcow2", f"write -P 9 0 {mib}M")
    (directory / "mail-base.qcow2").unlink()
    yield _place(directory)


@contextlib.contextmanager
def _chains_with_troubles(directory: Path) -> Iterator[Place]:
    with _several_chains(directory) as place:
        break_bitmap(directory / "web.qcow2", "daily")
        yield place


@contextlib.contextmanager
def _linked_clones(directory: Path) -> Iterator[Place]:
    for name in ("golden", "vm1", "vm2"):
        (directory / name).mkdir()
    golden = create(directory / "golden" / "golden.qcow2", 64 * MIB)
    qemu_io(golden, "write -P 1 0 4M")
    for name in ("vm1", "vm2"):
        disk = create(directory / name / "disk.qcow2", backing="../golden/golden.qcow2")
        qemu_io(disk, "write -P 2 1M 2M")
    yield _place(directory)


@contextlib.contextmanager
def _full_volume(directory: Path) -> Iterator[Place]:
    with mounted_file_system(directory, "ext4", 64 * MIB) as mount:
        base = create(mount / "base.qcow2", 64 * MIB)
        qemu_io(base, "write -P 1 0 1M")
        top = create(mount / "snap1.qcow2", backing="base.qcow2")
        qemu_io(top, "write -P 2 2M 24M")
        free = os.statvfs(mount)
        (mount / "other").write_bytes(bytes(free.f_bavail * free.f_frsize - 4 * MIB))
        yield _place(mount)


@contextlib.contextmanager
def _broken_bitmap(directory: Path) -> Iterator[Place]:
    break_bitmap(chain(directory)[-1], "daily")
    yield _place(directory)


@contextlib.contextmanager
def _killed(directory: Path) -> Iterator[Place]:
    base = chain(directory, mib=12)[0]
    kill_while_copying(base, "--delete", "snap1.qcow2")
    yield _place(directory)


@contextlib.contextmanager
def _running(directory: Path) -> Iterator[Place]:
    with running_vm(directory / "vm", chain(directory)) as vm:
        called = {"/run/vm7/qmp": str(vm.qmp), "/images": str(directory)}
        yield Place(directory, called, seen_by=())


@contextlib.contextmanager
def _moved(directory: Path) -> Iterator[Place]:
    base = chain(directory, ("base", "snap1"))[0]
    (directory / "archive").mkdir()
    base.rename(directory / "archive" / base.name)
    yield _place(directory)


RECIPES: Final[dict[str, Callable[[Path], contextlib.AbstractContextManager[Place]]]] = {
    "Delete one snapshot": _chain_of_four,
    "Keep only the disk": _chain_of_four,
    "Thin out snapshots": _snapshots_of_days,
    "Which chain first": _several_chains,
    "What needs attention": _chains_with_troubles,
    "Linked clones": _linked_clones,
    "The volume is full": _full_volume,
    "The backup complains about a bitmap": _broken_bitmap,
    "Killed at night": _killed,
    "A running VM": _running,
    "The disk was moved": _moved,
}
"""By heading, what is there before the first command is run."""


def blocks_of(heading: str) -> list[str]:
    """What stands in the frames below a heading."""
    page = PAGE.read_text(encoding="utf-8")
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return _BLOCK.findall(section)


def run_block(block: str, place: Place, program: Path) -> str:
    """The same block with what its commands print here, as the page would call it."""
    lines = []
    # What is known of merges depends on nothing that was merged before.
    state = program.parent / "state" / place.images.as_posix().replace("/", "-")
    for line in block.splitlines():
        if not line.startswith("$ "):
            continue
        ran = subprocess.run(
            [*place.seen_by, "sh", "-c", place.here(line.removeprefix("$ "))],
            cwd=place.images,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            env=environment(PATH=path_with(program), XDG_STATE_HOME=str(state)),
        )
        # Progress goes where errors go, and is left out.
        said = ran.stdout or ran.stderr
        lines += [line, *place.said(said.decode()).splitlines(), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def comparable(block: str) -> list[str]:
    """The lines of a block, without what differs from one machine or run to the next."""
    for pattern, name in _VARIES:
        block = re.sub(pattern, name, block)
    return [line.strip() for line in block.splitlines() if line.strip()]


@pytest.fixture
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(tmp_path_factory.mktemp("bin"))


@pytest.mark.parametrize("heading", RECIPES)
def test_a_recipe_as_it_is_printed(
    heading: str, tmp_path_factory: pytest.TempPathFactory, program: Path
) -> None:
    blocks = blocks_of(heading)
    assert blocks
    with RECIPES[heading](_alone(tmp_path_factory.mktemp("recipe"))) as place:
        for block in blocks:
            assert comparable(run_block(block, place, program)) == comparable(block)
        for image in place.images.rglob("*.qcow2"):
            if heading not in {"A running VM", "Which chain first", "What needs attention"}:
                assert_clean(image)


def test_all_recipes_are_run() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", page, re.MULTILINE) == list(RECIPES)
    assert len(_BLOCK.findall(page)) == sum(len(blocks_of(heading)) for heading in RECIPES)


def test_what_does_not_vary_is_compared() -> None:
    said = "$ chainmerge x\nCopies 11 MiB; pid 12 on kvm1, 0.3 s at 2026-01-02 03:04\n"
    assert comparable(said) == comparable(said.replace("11 MiB", "9.5 GiB").replace("12 ", "7 "))
    assert comparable(said) != comparable(said.replace("Copies", "Shares"))


def _alone(directory: Path) -> Path:
    """A place around which there are no images of others."""
    place = directory / "not" / "beside" / "others" / "images"
    place.mkdir(parents=True)
    return place


def _write_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as directory:
        program = installed(Path(directory) / "bin")
        for number, (heading, prepared) in enumerate(RECIPES.items()):
            before, title, section = page.partition(f"\n## {heading}\n")
            with prepared(_alone(Path(directory) / str(number))) as place:
                for block in blocks_of(heading):
                    section = section.replace(block, run_block(block, place, program), 1)
            page = before + title + section
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    _write_results()
