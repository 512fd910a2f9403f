# SPDX-License-Identifier: Apache-2.0
"""Chains with encrypted images: QEMU copies and compares, with the files that hold the keys."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge.documents.merge import MergeOutcome
from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.engines.qemu import commit as qemu_engine
from chainmerge.engines.qemu.errors import ImageNotOpened
from chainmerge.merging.errors import VerificationFailed
from chainmerge.options import ANY_IMAGE, MergeOptions
from chainmerge.planning.errors import (
    EncryptedImage,
    KeyFileUnusable,
    NativeUnavailable,
    PullUnavailable,
)
from tests.support.cli import chainmerge as command
from tests.support.encrypted import MIB, build

if TYPE_CHECKING:
    from pathlib import Path

# A letter for each image of the chain, from the root up: encrypted or plain.
CHAINS = ("EE", "EP", "PE", "EPE")


@pytest.mark.parametrize("kinds", CHAINS)
def test_merged_with_the_keys(tmp_path: Path, kinds: str) -> None:
    chain = build(tmp_path / "chain", kinds)
    before = chain.content(len(kinds) - 1)
    plan = chainmerge.plan(chain.top, chain.base, options=chain.options)
    assert not plan.refusals
    assert plan.engine == "qemu"
    assert "encrypted" in plan.engine_reason
    reveals = any("can be read there" in warning for warning in plan.warnings)
    assert reveals == (kinds[0] == "P")
    report = chainmerge.merge(chain.top, chain.base, options=chain.options)
    assert any("by qemu-img" in sentence for sentence in report.verified)
    chain.assert_merged(before)
    again = chainmerge.merge(chain.top, chain.base, options=chain.options)
    assert again.outcome is MergeOutcome.ALREADY_MERGED
    chain.assert_merged(before)


def test_nothing_is_written_without_the_right_keys(tmp_path: Path) -> None:
    chain = build(tmp_path / "chain", "EEP")
    before = chain.checksums()
    keys, base, middle = chain.key_files, str(chain.images[0]), str(chain.images[1])
    for given, refusal in (
        ({}, EncryptedImage),
        ({base: keys[base]}, EncryptedImage),
        ({ANY_IMAGE: keys[base]}, ImageNotOpened),
        ({base: keys[middle], middle: keys[base]}, ImageNotOpened),
        ({ANY_IMAGE: keys[middle], base: str(tmp_path / "nothing")}, KeyFileUnusable),
    ):
        with pytest.raises(refusal):
            chainmerge.merge(chain.top, chain.base, options=MergeOptions(key_files=given))
        assert chain.checksums() == before
    given = {ANY_IMAGE: keys[middle], base: keys[base]}
    chainmerge.merge(chain.top, chain.base, options=MergeOptions(key_files=given))


def test_what_only_the_native_engine_does(tmp_path: Path) -> None:
    chain = build(tmp_path / "chain", "PE")
    for options, refusal in (
        (MergeOptions(engine="native", key_files=chain.key_files), NativeUnavailable),
        (MergeOptions(direction="pull", key_files=chain.key_files), PullUnavailable),
    ):
        with pytest.raises(refusal, match="encrypted"):
            chainmerge.merge(chain.top, options=options)


def test_a_copy_that_went_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = build(tmp_path / "chain", "EE")
    before = chain.content(1)

    def copies_nothing(*_arguments: object, **_more: object) -> None:
        pass

    with monkeypatch.context() as patch:
        patch.setattr(qemu_engine, "commit_by_daemon", copies_nothing)
        with pytest.raises(VerificationFailed, match="mismatch at offset 524288"):
            chainmerge.merge(chain.top, options=chain.options)
    chainmerge.merge(chain.top, options=chain.options)
    chain.assert_merged(before)


@pytest.mark.parametrize("sizes", [(8, 4), (4, 8)], ids=["shorter top", "longer top"])
def test_disks_of_different_sizes(tmp_path: Path, sizes: tuple[int, int]) -> None:
    chain = build(tmp_path / "chain", "EE", [size * MIB for size in sizes])
    before = chain.content(1)
    if sizes[0] > sizes[1]:
        chain.write(0, "write -q -P 7 6M 1M")
    chainmerge.merge(chain.top, options=chain.options)
    assert chain.content(0)[: sizes[1] * MIB] == before
    report = chainmerge.merge(chain.top, options=chain.options)
    assert report.outcome is MergeOutcome.ALREADY_MERGED


def test_killed_while_copying(tmp_path: Path) -> None:
    chain = build(tmp_path / "chain", "EE")
    before = chain.content(1)

    def die(event: ProgressEvent) -> None:
        if event.stage is Stage.BITMAPS:
            os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        try:
            chainmerge.merge(chain.top, options=chain.options, on_progress=die)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert chain.content(1) == before
    chainmerge.merge(chain.top, options=chain.options)
    chain.assert_merged(before)


def test_the_command(tmp_path: Path) -> None:
    chain = build(tmp_path / "chain", "EE")
    before = chain.content(1)
    (base, its_key), (_, key_of_top) = chain.key_files.items()
    ran = command("merge", "--key-file", f"{base}=", chain.top)
    assert ran.status == 2
    ran = command("merge", chain.top)
    assert ran.status == 3
    assert "--key-file" in ran.err
    ran = command("merge", "--key-file", key_of_top, "--key-file", f"{base}={its_key}", chain.top)
    assert ran.status == 0
    chain.assert_merged(before)
