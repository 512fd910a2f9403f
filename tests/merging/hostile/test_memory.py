# SPDX-License-Identifier: Apache-2.0
"""Hostile images: how much they make us take."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest

from chainmerge.errors import ExitCode
from tests.chain.overlays import overlay
from tests.support.cli import environment
from tests.support.hostile import (
    CLUSTER,
    DISK,
    Victim,
)
from tests.support.images import MIB
from tests.support.qemu import create
from tests.support.surgery import (
    L1_OFFSET,
    L1_SIZE,
    REFCOUNT_CLUSTERS,
    REFCOUNT_OFFSET,
    SNAPSHOT_COUNT,
    SNAPSHOTS_OFFSET,
    get_bytes,
    put_bytes,
)
from tests.support.wounds import Anatomy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


MEMORY_LIMIT: Final = 2 << 30
MOST_RESIDENT: Final = 400 * MIB
# Run where memory is limited; tells the statuses and how much memory was in use at most.
_COMMANDS_IN_LITTLE_MEMORY: Final = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
from chainmerge.cli.main import run
image = sys.argv[2]
commands = [["plan"], ["measure"], ["info"], ["check"], ["bitmaps", "list"]]
commands += [["repair", "--dry-run"], ["merge"]]
found = {" ".join(command): run([*command, "--json", image]) for command in commands}
# Not ru_maxrss: that begins with what the process that started this one had.
peak = 1024 * next(
    int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:")
)
print("\\n" + json.dumps([found, peak]))
"""


def _huge_disk(victim: Victim) -> None:
    victim.top.unlink()
    create(victim.top, 1 << 51, backing=victim.base.name)


def _l1_table_of_32_mib(victim: Victim) -> None:
    end = _end_of(victim.top)
    os.truncate(victim.top, end + (32 << 20))
    L1_SIZE.put(victim.top, 4 << 20)
    L1_OFFSET.put(victim.top, end)


def _refcount_table_of_8_mib(victim: Victim) -> None:
    end = _end_of(victim.base)
    entries = get_bytes(victim.base, REFCOUNT_OFFSET.get(victim.base), CLUSTER)
    put_bytes(victim.base, end, entries)
    os.truncate(victim.base, end + (8 << 20))
    REFCOUNT_OFFSET.put(victim.base, end)
    REFCOUNT_CLUSTERS.put(victim.base, 2048)


def _sparse_base(victim: Victim) -> None:
    os.truncate(victim.base, 1 << 42)


def _sparse_top(victim: Victim) -> None:
    os.truncate(victim.top, 1 << 43)


def _raw_base_of_8_tib(victim: Victim) -> None:
    victim.base.write_bytes(b"x")
    os.truncate(victim.base, 1 << 43)
    overlay(victim.top, victim.base.name, "raw")


def _many_bitmaps(victim: Victim) -> None:
    """All with the same table, as if the directory of 64 MiB that the format allows were there."""
    anatomy = Anatomy(victim.top)
    table = anatomy.bitmaps[0]
    names = [b"%d" % number for number in range(5000)]
    entries = [
        struct.pack(">QIIBBHI", table.table_offset, table.table_size, 2, 1, 9, len(name) + 900, 0)
        + name.ljust(len(name) + 900, b"x")
        for name in names
    ]
    directory = b"".join(entry + bytes(-len(entry) % 8) for entry in entries)
    end = _end_of(victim.top)
    put_bytes(victim.top, end, directory)
    header = struct.pack(">IIQQ", len(names), 0, len(directory), end)
    put_bytes(victim.top, anatomy.extension, header)


def _many_snapshots(victim: Victim) -> None:
    """65,536 of them, each with an L1 table of 32 MiB, which is the same one."""
    end = _end_of(victim.base)
    size = struct.pack(">QQ", 0, DISK)
    l1_table = end + (8 << 20)
    entry = struct.pack(">QIHHIIQII", l1_table, 4 << 20, 1, 1, 0, 0, 0, 0, 16) + size + b"ab"
    put_bytes(victim.base, end, entry.ljust(64, b"\0") * 65536)
    os.truncate(victim.base, l1_table + (32 << 20))
    SNAPSHOT_COUNT.put(victim.base, 65536)
    SNAPSHOTS_OFFSET.put(victim.base, end)


def _end_of(path: Path) -> int:
    size = path.stat().st_size
    return size + -size % CLUSTER


@pytest.mark.parametrize(
    "claim",
    [
        _huge_disk,
        _l1_table_of_32_mib,
        _refcount_table_of_8_mib,
        _sparse_base,
        _sparse_top,
        _raw_base_of_8_tib,
        _many_bitmaps,
        _many_snapshots,
    ],
)
def test_huge_claims_take_little_memory(victim: Victim, claim: Callable[[Victim], None]) -> None:
    claim(victim)
    script = [sys.executable, "-c", _COMMANDS_IN_LITTLE_MEMORY]
    ran = subprocess.run(
        [*script, str(MEMORY_LIMIT), str(victim.top)],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
        timeout=120,
    )
    assert "internal-error" not in ran.stdout
    assert "MemoryError" not in ran.stdout + ran.stderr
    statuses, peak = json.loads(ran.stdout.splitlines()[-1])
    assert set(statuses.values()) <= {ExitCode.DONE, ExitCode.FAILED, ExitCode.REFUSED}, statuses
    assert peak < MOST_RESIDENT
