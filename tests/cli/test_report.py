# SPDX-License-Identifier: Apache-2.0
"""Reports as HTML files: of chains, of a plan, and of a merge before and after it."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import msgspec
import pytest

from chainmerge.documents.chain_pictures import ChainsPictures
from chainmerge.errors import ExitCode
from chainmerge.report.html import BEGINNING
from chainmerge.storage.locks import LockMode, lock_image
from tests.support.cli import chainmerge
from tests.support.images import MIB
from tests.support.qemu import content, create, qemu_io

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    """Base, a snapshot and the active image, with data in each."""
    images = [create(tmp_path / "base.qcow2", 16 * MIB)]
    images += [create(tmp_path / "snap.qcow2", backing=images[0])]
    images += [create(tmp_path / "active.qcow2", backing=images[1])]
    for number, image in enumerate(images):
        qemu_io(image, f"write -q -P {number + 1} {number}M 2M")
    return images


def test_chains_are_drawn(chain: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "chains.html"
    before = {path: path.read_bytes() for path in chain}
    ran = chainmerge("report", tmp_path, "-o", file)
    assert (ran.status, ran.out) == (0, f"{file}: 1 chain, all drawn; 0 findings\n")
    page = file.read_text()
    assert page.startswith(BEGINNING)
    assert "active.qcow2" in page
    assert {path: path.read_bytes() for path in chain} == before
    # The older report is replaced.
    ran = chainmerge("report", "--chains", "0", tmp_path, "-o", file)
    assert ran.out == f"{file}: 1 chain, 0 of them drawn; 0 findings\n"
    assert len(file.read_text()) < len(page)


def test_an_upper_end_may_be_named_and_json_printed(chain: list[Path]) -> None:
    ran = chainmerge("report", "--json", chain[1])
    assert (ran.status, ran.err) == (0, "")
    assert ran.json["event"] == "report"
    found = msgspec.json.decode(ran.out.splitlines()[-1], type=ChainsPictures)
    assert [one.leaf for one in found.chains] == [str(chain[1])]
    assert len(found.pictures[0].layers) == 2


def test_what_cannot_be_drawn_is_said(chain: list[Path], tmp_path: Path) -> None:
    os.truncate(chain[0], 300)
    file = tmp_path / "chains.html"
    ran = chainmerge("report", tmp_path, "-o", file)
    assert ran.status == 0
    assert "Warnings" in ran.out
    assert "base.qcow2" in ran.out
    page = file.read_text()
    assert "Not drawn, or not looked at" in page
    assert re.search(r"\d+ critical", page)


def test_a_file_has_to_be_named(tmp_path: Path) -> None:
    ran = chainmerge("report", tmp_path)
    assert ran.status == ExitCode.USAGE
    assert "--output" in ran.err


@pytest.mark.parametrize("command", ["report", "plan", "merge"])
def test_no_image_is_overwritten_by_a_report(
    command: str, chain: list[Path], tmp_path: Path
) -> None:
    """The active image is named where the report should be, also by a link to it."""
    link = tmp_path / "link.html"
    link.symlink_to(chain[2])
    raw = tmp_path / "disk.img"
    raw.write_bytes(b"<!DOCTYPE html>\n" + bytes(MIB))
    before = {path: path.read_bytes() for path in (*chain, raw)}
    option = "-o" if command == "report" else "--report"
    for file in (chain[2], link, raw, tmp_path):
        ran = chainmerge(command, chain[2], option, file)
        assert (ran.status, "not a report" in ran.err) == (ExitCode.REFUSED, True), ran
    assert {path: path.read_bytes() for path in (*chain, raw)} == before
    assert link.is_symlink()


def test_an_empty_file_is_replaced(chain: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "made-by-mktemp.html"
    file.touch()
    assert chainmerge("report", chain[2], "-o", file).status == 0
    assert file.stat().st_size > 1000


def test_a_plan_is_drawn_and_its_command_does_without(chain: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "plan.html"
    ran = chainmerge("plan", "--base", chain[0], chain[2], "--report", file)
    assert ran.status == 0
    assert f"Do it: chainmerge merge --base {chain[0]} {chain[2]}\n" in ran.out
    page = file.read_text()
    assert "gets all of it" in page
    assert "goes into" in page
    assert f"chainmerge merge --base {chain[0]} {chain[2]}" in page


def test_a_merge_is_drawn_before_and_after(chain: list[Path], tmp_path: Path) -> None:
    file, expected = tmp_path / "merge.html", content(chain[2])
    ran = chainmerge(
        "merge", "--base", chain[0], "--delete", "--keep-name", chain[2], "--report", file
    )
    assert ran.status == 0, ran
    assert content(chain[2]) == expected
    page = file.read_text()
    assert page.index("Done: ") < page.index("Before") < page.index("After")
    assert "3 images, a disk of 16 MiB: 4 MiB of data that the guest sees, 2 MiB hidden" in page
    assert "1 image, a disk of 16 MiB: 4 MiB of data that the guest sees, 0 B hidden" in page


def test_what_stands_on_the_images_is_drawn_too(chain: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "merge.html"
    ran = chainmerge("plan", chain[1], "--report", file)
    assert ran.status == 0
    assert "gets base.qcow2 as its backing file" in file.read_text()
    ran = chainmerge("merge", chain[1], "--delete", "--report", file)
    assert ran.status == 0
    page = file.read_text()
    assert "3 images, a disk of 16 MiB" in page
    assert "2 images, a disk of 16 MiB" in page
    assert page.count("active.qcow2") > 4


def test_several_disks_are_drawn(chain: list[Path], tmp_path: Path) -> None:
    other = create(tmp_path / "other.qcow2", 16 * MIB)
    top = create(tmp_path / "other-top.qcow2", backing=other)
    qemu_io(top, "write -q -P 9 0 1M")
    file = tmp_path / "merge.html"
    ran = chainmerge("merge", chain[2], top, "--report", file, "--json")
    assert ran.status == 0, ran
    page = file.read_text()
    assert page.count("<h2>") == 4
    assert "2 of 2 disks merged" in page


def test_what_cannot_be_written_is_found_out_before_a_merge(
    chain: list[Path], tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in chain}
    ran = chainmerge("merge", chain[2], "--report", tmp_path / "nowhere" / "merge.html", "--json")
    assert ran.status == ExitCode.REFUSED
    assert ran.json["code"] == "report-file-unusable"
    assert {path: path.read_bytes() for path in chain} == before


def test_a_merge_that_is_refused_is_drawn_as_far_as_it_came(
    chain: list[Path], tmp_path: Path
) -> None:
    file = tmp_path / "merge.html"
    with lock_image(chain[1], LockMode.WRITER, 0):
        ran = chainmerge("merge", chain[1], "--lock-wait", "0", "--report", file)
    assert ran.status == ExitCode.REFUSED
    page = file.read_text()
    assert "The merge was about to begin" in page
    assert "REFUSED" in page
    assert "After" not in page
