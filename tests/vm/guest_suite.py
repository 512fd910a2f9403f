# SPDX-License-Identifier: Apache-2.0
"""Runs the tests of :mod:`tests.vm.guest` in a machine; the exit status is theirs.

Arguments go to pytest. What power cuts are made of is recorded in ``build/vm/recordings``.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.vm.power.recordings import RECORDINGS
from tests.vm.rig import MIB, PROJECT, Disk, booted

# The parent's conftest takes in what the guest is better off without, such as hypothesis.
_PYTEST: Final = (
    "python3", "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-p",
    "no:hypothesispytest", "--confcutdir=tests/vm/guest", "--timeout=1800",
)  # fmt: skip


def main() -> int:
    RECORDINGS.mkdir(parents=True, exist_ok=True)
    passed_on = {
        name: value for name, value in os.environ.items() if name.startswith("CHAINMERGE_SOAK")
    }
    environment = {**passed_on, "PYTHONPATH": f"{PROJECT / 'src'}:{PROJECT}"}
    command = [*_PYTEST, *(sys.argv[1:] or ["tests/vm/guest"])]
    with tempfile.TemporaryDirectory(prefix="chainmerge-vm-") as scratch:
        disks = [
            Disk("plain0", Path(scratch) / "plain0", 320 * MIB),
            Disk("plain1", Path(scratch) / "plain1", 192 * MIB),
            Disk("sectors4k", Path(scratch) / "sectors4k", 64 * MIB, sector_size=4096),
            Disk("recorded", Path(scratch) / "recorded", 64 * MIB),
            Disk("files", Path(scratch) / "files", 64 * MIB),
            Disk("xfs", Path(scratch) / "xfs", 320 * MIB),
            Disk("log", Path(scratch) / "log", 1024 * MIB),
        ]
        with booted(command, disks, environment, echo=sys.stdout) as machine:
            return machine.wait()


if __name__ == "__main__":
    sys.exit(main())
