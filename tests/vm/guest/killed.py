# SPDX-License-Identifier: Apache-2.0
"""One life of a machine that is killed in the middle of a merge, and boots again.

Finishes and checks what the previous life left, prepares the next merge, says so, and merges.
``python3 -m tests.vm.guest.killed ROUND MODE``; in mode ``sysrq`` the machine resets itself at
a random moment of the merge, in mode ``outside`` it goes on until somebody kills it.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Final

from tests.support.qemu import bitmap_names, content, create, qemu_img, qemu_io, run
from tests.vm.commands import chainmerge_forked
from tests.vm.guest.volumes import MIB, Group, create_group, fill, scratch_disk

DISK: Final = 24 * MIB
GROUP: Final = "killed"
STATE: Final = Path("/var/lib/chainmerge")


def main() -> int:
    number, mode = int(sys.argv[1]), sys.argv[2]
    _bring_up_state(first=number == 0)
    if number == 0:
        group = create_group(GROUP, [scratch_disk("plain0")], extent_size=MIB)
        group.create("base", 12 * MIB)
        group.create("top", 28 * MIB)
    else:
        group = Group(GROUP)
        run("vgchange", "-q", "-ay", GROUP)
        _finish(group, number - 1)
    if mode == "end":
        return 0
    _prepare(group, number)
    if number == 0:
        # To know how long it takes.
        started = time.monotonic()
        assert chainmerge_forked("merge", group.path("top")).status == 0
        print(f"takes {time.monotonic() - started}", flush=True)
        _prepare(group, number)
    print("merging", flush=True)
    if mode != "outside":
        _reset_after(random.Random(number).random() * float(mode))
    ran = chainmerge_forked("merge", group.path("top"))
    print("ended before it was killed", ran.status, flush=True)
    # Whoever wants to kill the machine is still on his way.
    threading.Event().wait(60)
    return 0


def _bring_up_state(*, first: bool) -> None:
    """What outlives processes outlives the machine, as on a disk."""
    disk = scratch_disk("state")
    if first:
        run("mkfs.ext4", "-q", "-F", disk)
    run("mount", disk, STATE)


def _prepare(group: Group, number: int) -> None:
    base, top = group.path("base"), group.path("top")
    for volume in (base, top):
        fill(volume)
    create(base, DISK)
    qemu_img("bitmap", "--add", "-f", "qcow2", base, "both")
    qemu_img("bitmap", "--add", "-f", "qcow2", base, "stale")
    qemu_io(base, f"write -P {number + 1} 0 6M")
    create(top, backing=base)
    for name in ("both", "new"):
        qemu_img("bitmap", "--add", "-f", "qcow2", top, name)
    # More than base's volume holds: it has to be extended.
    qemu_io(top, f"write -P {number + 100} 3M 14M", "write -z 20M 1M")
    os.sync()


def _expected(number: int) -> bytes:
    old, new = bytes([number + 1]), bytes([number + 100])
    return (old * (3 * MIB) + new * (14 * MIB)).ljust(DISK, b"\0")


def _finish(group: Group, number: int) -> None:
    base, top = group.path("base"), group.path("top")
    assert content(top) == _expected(number), "the guest does not see its disk"
    names = bitmap_names(base)
    assert names["both"]["flags"] == ["auto"], names
    qemu_img("check", "-q", "-f", "qcow2", base, expect=(0, 3))
    unchanged = "new" not in names
    ran = chainmerge_forked("merge", "--shrink", "--leave", "0", top)
    assert ran.status == 0, ran
    assert content(base) == _expected(number), "base is not what it was to become"
    names = bitmap_names(base)
    assert {name: bitmap["flags"] for name, bitmap in names.items()} == {
        "both": ["auto"],
        "new": ["auto"],
    }
    qemu_img("check", "-q", "-f", "qcow2", base)
    print(f"round {number} is finished; it had left the", "old" if unchanged else "new", "image")
    run("lvreduce", "-q", "-f", "-L", f"{12 * MIB}b", f"{GROUP}/base", expect=(0, 5))


def _reset_after(seconds: float) -> None:
    """Reset the machine in the middle of something; nothing is written back before."""

    def reset() -> None:
        Path("/proc/sysrq-trigger").write_text("b")

    timer = threading.Timer(seconds, reset)
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    sys.exit(main())
