# SPDX-License-Identifier: Apache-2.0
"""The chains of a directory at a glance: what merging each frees, and what is wrong with it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge import Access, ChainSummary, MergeOptions
from chainmerge.documents.images import ImageUser
from chainmerge.errors import ExitCode
from chainmerge.inventory.errors import DirectoryTooLarge, DirectoryUnreadable
from chainmerge.inventory.leaves import images_in
from tests.support.cli import chainmerge as command
from tests.support.images import MIB
from tests.support.qemu import create, qemu_io

if TYPE_CHECKING:
    from collections.abc import Sequence

DISK = 64 * MIB


def chain_of(directory: Path, name: str, writes: Sequence[tuple[int, int]]) -> list[Path]:
    """A chain in which each image holds so many MiB from there on (offset, length)."""
    images: list[Path] = []
    for number, (offset, length) in enumerate(writes):
        path = directory / f"{name}-{number}.qcow2"
        create(path, DISK) if not images else create(path, backing=images[-1])
        if length:
            qemu_io(path, f"write -P {number + 1} {offset}M {length}M")
        images.append(path)
    return images


def summaries(directory: Path, access: Access | None = None) -> dict[str, ChainSummary]:
    """By the names of the leaves, in the order of the report."""
    report = chainmerge.list_chains(directory, access)
    return {Path(one.leaf).name: one for one in report.chains}


def occupied(directory: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in directory.iterdir())


def test_what_frees_most_comes_first(tmp_path: Path) -> None:
    chain_of(tmp_path, "little", [(0, 2), (1, 2)])
    chain_of(tmp_path, "much", [(0, 16), (0, 16), (0, 16)])
    chain_of(tmp_path, "nothing", [(0, 8), (16, 8)])
    chain_of(tmp_path, "alone", [(0, 4)])
    report = chainmerge.list_chains(tmp_path)
    assert [(Path(one.leaf).name, one.images, one.freed_bytes) for one in report.chains] == [
        ("much-2.qcow2", 3, 32 * MIB),
        ("little-1.qcow2", 2, 1 * MIB),
        ("alone-0.qcow2", 1, 0),
        ("nothing-1.qcow2", 2, 0),
    ]
    assert [one.base is None for one in report.chains] == [False, False, True, False]
    assert report.freed_bytes == 33 * MIB
    assert report.occupied_bytes == occupied(tmp_path)
    assert {one.virtual_size for one in report.chains} == {DISK}


@pytest.mark.parametrize(
    "writes", [[(0, 16), (8, 16), (12, 4)], [(0, 4), (0, 8)], [(0, 1), (2, 1), (4, 1)]]
)
def test_a_merge_frees_what_was_said(tmp_path: Path, writes: list[tuple[int, int]]) -> None:
    images = chain_of(tmp_path, "disk", writes)
    (said,) = chainmerge.list_chains(tmp_path).chains
    assert (said.base, said.leaf) == (str(images[0]), str(images[-1]))
    before = occupied(tmp_path)
    report = chainmerge.merge(
        said.leaf, said.base, options=MergeOptions(delete=True, keep_name=True)
    )
    freed = before - occupied(tmp_path)
    # The tables of the images that are gone come on top.
    assert 0 <= freed - (said.freed_bytes or 0) <= MIB
    assert report.bytes_copied == said.bytes_to_copy


def test_what_clones_share_is_not_merged(tmp_path: Path) -> None:
    base, golden = chain_of(tmp_path, "golden", [(0, 8), (0, 8)])
    first = create(tmp_path / "first-a.qcow2", backing=golden)
    qemu_io(first, "write -P 7 0 4M")
    leaf = create(tmp_path / "first-b.qcow2", backing=first)
    qemu_io(leaf, "write -P 8 0 3M")
    create(tmp_path / "second.qcow2", backing=golden)
    found = summaries(tmp_path)
    assert list(found) == ["first-b.qcow2", "second.qcow2"]
    assert (found["first-b.qcow2"].base, found["first-b.qcow2"].freed_bytes) == (
        str(first),
        3 * MIB,
    )
    assert (found["second.qcow2"].base, found["second.qcow2"].freed_bytes) == (None, 0)
    assert found["second.qcow2"].images == 3
    # Each file counts once.
    assert chainmerge.list_chains(tmp_path).occupied_bytes == occupied(tmp_path)
    assert base.exists()


def test_a_broken_image_is_a_line(tmp_path: Path) -> None:
    chain_of(tmp_path, "sound", [(0, 2), (0, 2)])
    lost, _ = chain_of(tmp_path, "lost", [(0, 1), (0, 1)])
    lost.unlink()
    whole = chain_of(tmp_path, "short", [(0, 1)])[0]
    os.truncate(whole, 300)
    middle, _ = chain_of(tmp_path, "middle", [(0, 1), (0, 1)])
    with middle.open("r+b") as file:
        file.seek(20)
        file.write(b"\xff" * 4)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "directory.qcow2").mkdir()
    found = summaries(tmp_path)
    assert next(iter(found)) == "sound-1.qcow2"
    assert set(found) == {"sound-1.qcow2", "lost-1.qcow2", "short-0.qcow2", "middle-1.qcow2"}
    for name in ("lost-1.qcow2", "short-0.qcow2", "middle-1.qcow2"):
        assert found[name].freed_bytes is None
        assert found[name].problem
    assert "lost-0.qcow2" in (found["lost-1.qcow2"].problem or "")
    ran = command("list", tmp_path)
    assert ran.status == ExitCode.DONE
    assert ran.out.startswith(f"4 chains in {tmp_path} take ")
    assert ran.out.count("unreadable") == 3


def test_who_has_a_leaf_open(tmp_path: Path) -> None:
    leaf = chain_of(tmp_path, "disk", [(0, 1), (0, 1)])[-1]
    chain_of(tmp_path, "idle", [(0, 4), (0, 4)])
    with leaf.open("rb") as held:
        process = subprocess.Popen(["sleep", "600"], stdin=held)
    try:
        found = summaries(tmp_path)
        shown = command("info", leaf).out
        listed = command("info", tmp_path).out.splitlines()
    finally:
        process.kill()
        process.wait()
    assert found["disk-1.qcow2"].users == (ImageUser(process.pid, "sleep"),)
    assert found["idle-1.qcow2"].users == ()
    assert f"open in sleep (pid {process.pid})" in shown
    assert any(line.endswith(f"in use (pid {process.pid})") for line in listed)
    # A merge of what is in use would be refused.
    assert "idle-1.qcow2" in listed[1]


def test_what_nobody_may_look_at_is_not_known(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        parent.chmod(parent.stat().st_mode | 0o11)
    leaf = chain_of(tmp_path, "disk", [(0, 1), (0, 1)])[-1]
    script = (
        "import os, sys; from chainmerge import inspect, list_chains;"
        "os.setgid(65534); os.setuid(65534);"
        "print([one.users for one in list_chains(sys.argv[1]).chains],"
        "{one.users for one in inspect(sys.argv[2]).images})"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(leaf)], capture_output=True, check=False
    )
    assert out.stdout == b"[None] {None}\n", out.stderr


def test_an_unfinished_merge_is_told_of(tmp_path: Path) -> None:
    base, top = chain_of(tmp_path, "disk", [(0, 4), (2, 4)])
    chain_of(tmp_path, "idle", [(0, 1), (0, 1)])
    (tmp_path / f".{base.name}.chainmerge-journal").write_bytes(b"not a journal")
    found = summaries(tmp_path)
    assert (found[top.name].unfinished, found["idle-1.qcow2"].unfinished) == (True, False)
    ran = command("list", tmp_path)
    assert f"Finish or cancel: chainmerge status {tmp_path}" in ran.out
    assert "idle-1.qcow2" in ran.out.splitlines()[2]


def test_other_directories_only_where_they_are_allowed(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    base = create(tmp_path / "there" / "base.qcow2", DISK)
    create(tmp_path / "here" / "leaf.qcow2", backing=base)
    refused = summaries(tmp_path / "here")["leaf.qcow2"]
    assert "base.qcow2" in (refused.problem or "")
    allowed = Access(allow_backing=(str(tmp_path / "there"),))
    assert summaries(tmp_path / "here", allowed)["leaf.qcow2"].images == 2
    there = str(tmp_path / "there")
    assert command("list", tmp_path / "here", "--allow-backing", there).out.count("unreadable") == 0


def test_nothing_is_written_and_nothing_locked(tmp_path: Path) -> None:
    leaf = chain_of(tmp_path, "disk", [(0, 1), (0, 1)])[-1]
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.iterdir()}
    writer = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", leaf], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert writer.stdout is not None
        # It has the image open, and locked, once it prompts.
        writer.stdout.read(1)
        assert summaries(tmp_path)[leaf.name].images == 2
    finally:
        writer.communicate(b"quit\n")
    now = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.iterdir()}
    assert {file: content for file, (_, content) in now.items()} == {
        file: content for file, (_, content) in before.items()
    }


def test_a_directory_that_cannot_be_listed(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}").touch()
    with pytest.raises(DirectoryTooLarge):
        images_in(tmp_path, 2)
    assert images_in(tmp_path, 3).images == ()
    with pytest.raises(DirectoryUnreadable):
        chainmerge.list_chains(tmp_path / "missing")
    ran = command("list", tmp_path / "0")
    assert (ran.status, "Not a directory" in ran.err) == (ExitCode.REFUSED, True)


def test_no_images_at_all(tmp_path: Path) -> None:
    assert command("list", tmp_path).out == f"no qcow2 images in {tmp_path}\n"


def test_as_json(tmp_path: Path) -> None:
    chain_of(tmp_path, "disk", [(0, 1), (0, 1)])
    listed = command("list", "--json", tmp_path).json
    assert listed == command("info", "--json", tmp_path).json
    assert listed["chains"][0]["freed_bytes"] == MIB


def test_long_chains_in_one_table(tmp_path: Path) -> None:
    for length in (1, 3, 12):
        chain_of(tmp_path, f"of{length}", [(0, 1)] * length)
    found = list(chainmerge.list_chains(tmp_path).chains)
    assert [one.images for one in found] == [12, 3, 1]
    assert all((a.freed_bytes or 0) > (b.freed_bytes or 0) for a, b in pairwise(found))


def printed_plan(*words: str | Path) -> list[str]:
    """The words of the plan that a list prints, behind the program's name."""
    lines = command("list", *words).out.splitlines()
    (line,) = [one for one in lines if one.startswith("Frees most:")]
    program, *rest = shlex.split(line.partition(":")[2])
    assert program == "chainmerge"
    return rest


def test_the_printed_plan_reaches_what_the_list_has_reached(tmp_path: Path) -> None:
    golden = tmp_path / "golden images"
    golden.mkdir()
    root = create(golden / "root.qcow2", DISK)
    images = [create(tmp_path / "disk-0.qcow2", backing=root)]
    images.append(create(tmp_path / "disk-1.qcow2", backing=images[0]))
    for image in images:
        qemu_io(image, "write -P 1 0 8M")
    words = printed_plan("--allow-backing", golden, tmp_path)
    assert ["--allow-backing", str(golden)] == words[words.index("--allow-backing") :][:2]
    plan = command("plan", "--json", *words[1:]).json
    assert {one["code"] for one in plan["refusals"]} <= {"users-unknown"}


def test_the_printed_plan_may_use_the_data_files(tmp_path: Path) -> None:
    data = tmp_path / "its data"
    base = create(tmp_path / "disk-0.qcow2", DISK, data_file=str(data))
    qemu_io(base, "write -P 1 0 8M")
    top = create(tmp_path / "disk-1.qcow2", backing=base)
    qemu_io(top, "write -P 2 0 8M")
    (chain,) = chainmerge.list_chains(tmp_path).chains
    assert chain.data_files == (str(data),)
    words = printed_plan(tmp_path)
    assert command(*words).status == ExitCode.DONE
    option = words.index("--allow-data-file")
    assert command(*words[:option], *words[option + 2 :]).status == ExitCode.REFUSED
