# SPDX-License-Identifier: Apache-2.0
"""The check of sound images and of hostile ones agrees with QEMU's."""

from __future__ import annotations

import json
import subprocess
import tempfile
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chainmerge.qcow2.check import check
from chainmerge.qcow2.errors import FormatError
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.readable import BytesReadable
from chainmerge.qcow2.references import MAX_CLUSTERS
from chainmerge.qcow2.table_errors import TooManyClusters
from tests.qcow2.samples import Sample, assert_agrees, assert_clean
from tests.support import qemu
from tests.support.images import (
    GIB,
    KIB,
    MIB,
    Discard,
    ImagePlan,
    OpenImage,
    Write,
    WriteCompressed,
    WriteZeroes,
    apply_writes,
    build_chain,
    image_plans,
    open_qcow2,
    operations,
)

# Sound images


@given(plan=image_plans(), data=st.data())
def test_sound_images(plan: ImagePlan, data: st.DataObject) -> None:
    assert plan.geometry is not None
    is_v3 = plan.geometry.compat == "1.1"
    with tempfile.TemporaryDirectory() as scratch:
        (path,) = build_chain(Path(scratch), [plan])
        if is_v3 and data.draw(st.booleans()):
            qemu.qemu_img("bitmap", "-f", "qcow2", "--add", path, "bits", "-g", "512")
        # Many compressed clusters share one of the file, and refcounts must have room for twice
        # as many references; QEMU refuses the snapshot otherwise.
        dense = any(isinstance(each, WriteCompressed) for each in plan.operations)
        if plan.geometry.refcount_bits >= (16 if dense else 4):
            for number in range(data.draw(st.integers(0, 2))):
                qemu.qemu_img("snapshot", "-c", f"s{number}", path)
                later = data.draw(operations(plan.geometry, plan.disk_size, max_size=3))
                plain = [each for each in later if not isinstance(each, WriteCompressed)]
                apply_writes(path, plain)
        assert_clean(path)


@pytest.mark.parametrize(
    "options",
    [
        {"preallocation": "metadata"},
        {"preallocation": "metadata", "extended_l2": "on"},
        {"data_file": "data"},
        {"data_file": "data", "extended_l2": "on"},
        {"data_file": "data", "data_file_raw": "on", "preallocation": "metadata"},
    ],
    ids=str,
)
def test_sound_images_of_other_kinds(tmp_path: Path, options: dict[str, str]) -> None:
    path = tmp_path / "image"
    given_options = ",".join(
        f"{key}={tmp_path / value if key == 'data_file' else value}"
        for key, value in options.items()
    )
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-o", given_options, path, str(GIB))
    apply_writes(
        path, [Write(0, MIB), WriteZeroes(512 * MIB, 10 * MIB), Discard(128 * KIB, 64 * KIB)]
    )
    assert_clean(path)


def create_encrypted(path: Path, *secret: str) -> None:
    """QEMU measures how fast it can derive keys, and on a busy machine it may fail to."""
    options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
    argv = ["qemu-img", "create", "-q", *secret, "-f", "qcow2", "-o", options, str(path), "8M"]
    for _ in range(100):
        result = subprocess.run(argv, capture_output=True, text=True, check=False)
        if "Unable to get accurate CPU usage" not in result.stderr:
            break
    assert result.returncode == 0, result


def test_encrypted_images(tmp_path: Path) -> None:
    path = tmp_path / "image"
    secret = ["--object", "secret,id=key,data=letmein"]
    create_encrypted(path, *secret)
    image = open_qcow2(path)
    assert image.header.luks_header is not None
    report = check(image)
    assert report.clean, report.messages
    options = f"driver=qcow2,file.filename={path},encrypt.key-secret=key"
    out = qemu.qemu_img("check", *secret, "--image-opts", "--output=json", options)
    assert json.loads(out)["image-end-offset"] == report.image_end_offset


def test_a_large_image_takes_little_memory(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "image", 256 * GIB, preallocation="metadata")
    image = open_qcow2(path)
    tracemalloc.start()
    try:
        report = check(image)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert report.clean
    # For each of 4 Mi clusters a count of two bytes and a byte of marks, and 20 MiB of windows.
    assert peak < 4 * MIB * 3 + 20 * MIB


# Hostile images


@dataclass(frozen=True)
class Padded:
    """An image that goes on with zeros for very long, as a sparse file does."""

    name: str
    data: bytes
    size: int

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length].ljust(length, b"\0")


def test_files_that_claim_too_many_clusters_are_refused(samples: dict[str, Sample]) -> None:
    sample = samples["one-bit"]
    data = sample.path.read_bytes()
    with pytest.raises(TooManyClusters) as caught:
        check(Qcow2Image(Padded("huge", data, 1 << 60)))
    assert caught.value.clusters == 1 << 51
    # A file that is merely large for what is in it is none of that kind.
    largest = Padded("large", data, 512 * (MAX_CLUSTERS // 64))
    assert check(Qcow2Image(largest)).clean


def test_an_l2_table_that_is_used_a_thousand_times_is_read_once(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "image", 512 * GIB, refcount_bits=32)
    apply_writes(path, [Write(0, MIB)])
    image = open_qcow2(path)
    header = image.header
    with path.open("r+b") as file:
        file.seek(header.l1_table_offset)
        file.write(int(image.l1[0]).to_bytes(8, "big") * header.l1_size)
    readable = OpenImage(path)
    report = check(Qcow2Image(readable))
    assert_agrees(path)
    # 1024 references to a table with 16 entries, of which one is the right number each.
    assert report.corruptions == 1 + 16
    assert "used 1024 times" in report.messages[-1]
    # Header, L1 table, L2 table; refcount table and block, which the search for refcounts behind
    # the end of the file reads once more.
    assert readable.bytes_read < 10 * header.cluster_size


@given(noise=st.binary(min_size=64, max_size=64), repeat=st.integers(1, 64))
@settings(max_examples=4 * settings().max_examples)
def test_noise_in_tables_never_crashes(
    samples: dict[str, Sample], noise: bytes, repeat: int
) -> None:
    for sample in samples.values():
        content = bytearray(sample.path.read_bytes()) if sample.size < 2 * MIB else None
        if content is None:
            continue
        for places in sample.tables.values():
            offset, size = places[0]
            length = min(size, len(noise) * repeat)
            content[offset : offset + length] = (noise * repeat)[:length]
        try:
            report = check(Qcow2Image(BytesReadable("noise", bytes(content))))
        except FormatError:
            continue
        assert len(report.messages) <= 100
