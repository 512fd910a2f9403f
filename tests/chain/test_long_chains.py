# SPDX-License-Identifier: Apache-2.0
"""Chains of a thousand images, under the limits that an ordinary shell sets."""

from __future__ import annotations

import contextlib
import json
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from chainmerge.chain.discovery import discover
from chainmerge.chain.errors import ImageReplaced
from chainmerge.chain.opening import open_chain
from chainmerge.chain.target import policy_of
from chainmerge.options import Access
from chainmerge.storage.errors import ReadFailed
from chainmerge.storage.limits import allow_open_files
from chainmerge.storage.locks import LockMode, lock_image
from tests.support import cli, qemu
from tests.support.images import MIB
from tests.support.long_chain import CLUSTER, LongChain, build_long_chain, stamp

if TYPE_CHECKING:
    from chainmerge.chain.model import Chain

IMAGES: Final = 1000
SOFT_LIMIT: Final = 1024

# Says how much memory it took at most, in KiB, on a last line of its own. Not by ru_maxrss:
# that begins with what the process that started this one had.
PLAN: Final = """
import resource, sys
from chainmerge.cli.main import run
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
status = run(sys.argv[3:])
print(next(line.split()[1] for line in open("/proc/self/status") if "VmHWM" in line))
sys.exit(status)
"""


def plan_under_limits(hard_limit: int, *arguments: str | Path) -> tuple[int, Any, int]:
    """Exit status, report and peak of memory (bytes) of a plan in a process of its own."""
    soft_limit = min(SOFT_LIMIT, hard_limit)
    result = subprocess.run(
        [
            *(sys.executable, "-c", PLAN, str(soft_limit), str(hard_limit)),
            *("plan", "--json", *map(str, arguments)),
        ],
        capture_output=True,
        check=False,
        env=cli.environment(),
    )
    *report, peak = result.stdout.decode().splitlines()
    return result.returncode, json.loads(report[-1]), int(peak) * 1024


@pytest.fixture(scope="module")
def long_chain(tmp_path_factory: pytest.TempPathFactory) -> LongChain:
    needed = 3 * IMAGES
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < needed:
        pytest.skip(f"the hard limit for open files is below {needed}")
    return build_long_chain(tmp_path_factory.mktemp("long"), IMAGES, writes_per_image=4)


def found(top: Path) -> Chain:
    return discover(top, policy_of(Access()))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_the_images_are_what_qemu_would_have_made(tmp_path: Path) -> None:
    chain = build_long_chain(tmp_path, 5, writes_per_image=8, disk_size=64 * MIB)
    for path in chain.paths:
        qemu.assert_clean(path)
    expected = bytearray(64 * MIB)
    for cluster, image in chain.deciders().items():
        start = cluster * CLUSTER
        expected[start : start + CLUSTER] = stamp(image, cluster).ljust(CLUSTER, b"\0")
    assert qemu.content(chain.top) == bytes(expected)


def test_a_long_chain_is_planned_under_the_usual_limits(long_chain: LongChain) -> None:
    root, *overlays = long_chain.written
    status, report, peak = plan_under_limits(
        3 * IMAGES, long_chain.top, "--base", long_chain.paths[0]
    )
    assert status == 0, report
    assert len(report["images"]) == IMAGES
    assert report["movement"]["data_bytes"] == len(set().union(*overlays)) * CLUSTER
    assert report["movement"]["new_clusters"] == len(set().union(*overlays) - set(root))
    assert peak < 300 * MIB
    (warning,) = report["warnings"]
    paths = long_chain.paths
    assert f"{paths[1]} to {paths[-2]} ({IMAGES - 2} images) must not be used" in warning


def test_a_hard_limit_that_is_too_low_to_read_is_named(long_chain: LongChain) -> None:
    status, report, _ = plan_under_limits(512, long_chain.top)
    assert status == 3
    assert report["code"] == "open-files-limit"
    assert report["facts"]["limit"] == 512
    assert IMAGES < report["facts"]["needed"] < 1.2 * IMAGES
    assert f"ulimit -n {report['facts']['needed']}" in report["hint"]


def test_a_hard_limit_that_is_too_low_to_merge_is_in_the_plan(long_chain: LongChain) -> None:
    """The daemon that copies has the locks, and opens every image itself."""
    _, report, _ = plan_under_limits(IMAGES + 200, "--engine", "qemu", long_chain.top)
    (refusal,) = report["refusals"]
    assert refusal["code"] == "open-files-limit"


def test_a_long_chain_is_read_through_its_locks(long_chain: LongChain) -> None:
    chain = found(long_chain.top)
    allow_open_files(IMAGES)
    before = open_files()
    with contextlib.ExitStack() as stack:
        locks = [
            stack.enter_context(lock_image(image.path, LockMode.READER, 0))
            for image in chain.images
        ]
        opened = stack.enter_context(open_chain(chain, locks))
        assert open_files() == before + IMAGES
        view = opened.view()
        deciders = long_chain.deciders()
        for cluster in random.Random(1).sample(sorted(deciders), 12):
            expected = stamp(deciders[cluster], cluster)
            assert view.read(cluster * CLUSTER, len(expected)) == expected
        untouched = next(c for c in range(len(deciders) + 1) if c not in deciders)
        assert view.read(untouched * CLUSTER, CLUSTER) == bytes(CLUSTER)
    assert open_files() == before


def test_an_image_that_was_replaced_is_not_read(tmp_path: Path) -> None:
    chain = found(build_long_chain(tmp_path, 3, writes_per_image=1).top)
    middle = chain.images[1].path
    with lock_image(middle, LockMode.READER, 0) as lock:
        shutil.copy(middle, tmp_path / "copy")
        (tmp_path / "copy").replace(middle)
        with pytest.raises(ImageReplaced), open_chain(chain):
            pass
        # What was found is what is locked, and that is still there under its lock.
        with open_chain(chain, (lock,)) as opened:
            assert opened.images[1].image is not None
            # A lock on what is there now is one on another image.
        now = found(chain.top.path)
        with open_chain(now, (lock,)) as opened:
            status = middle.stat()
            identity = getattr(opened.images[1].readable, "identity", None)
            assert identity == (status.st_dev, status.st_ino) != lock.identity


def test_nothing_is_read_through_a_lock_that_was_released(tmp_path: Path) -> None:
    chain = build_long_chain(tmp_path, 2, writes_per_image=1)
    with lock_image(chain.top, LockMode.READER, 0) as lock:
        reader = lock.reader()
        assert reader.read(0, 4) == b"QFI\xfb"
    with pytest.raises(ReadFailed):
        reader.read(0, 4)


def test_the_size_is_that_of_the_time_after_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"x")
    with lock_image(path, LockMode.READER, 0) as lock:
        path.write_bytes(b"xyz")
        assert lock.reader().size == 3
