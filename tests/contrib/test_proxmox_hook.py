# SPDX-License-Identifier: Apache-2.0
"""The hook script of Proxmox VE, with programs that answer as Proxmox's do."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

import pytest

from tests.support.cli import Ran
from tests.support.operating import chain, installed, kill_while_copying, path_with

HOOK: Final = Path(__file__).parents[2] / "contrib" / "proxmox" / "chainmerge-hook"
CONFIG: Final = """\
boot: order=scsi0;ide2
cores: 2
ide2: local:iso/debian.iso,media=cdrom,size=1G
scsi0: local:100/active.qcow2,discard=on,size=48M
scsihw: virtio-scsi-single
unused0: local:100/old.qcow2
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """chainmerge, qm and pvesm."""
    program = installed(tmp_path / "bin")
    (tmp_path / "100.conf").write_text(CONFIG)
    # Only the disk is asked for; where it lies, pvesm knows.
    scripts = {
        "qm": f'test "$1 $2" = "config 100" && cat {tmp_path}/100.conf',
        "pvesm": f'test "$1 $2" = "path local:100/active.qcow2" && echo {tmp_path}/active.qcow2',
    }
    for name, script in scripts.items():
        (program / name).write_text(f"#!/bin/sh\n{script}\n")
        (program / name).chmod(0o755)
    return program


def asked(program: Path, phase: str = "pre-start", vmid: str = "100") -> Ran:
    ran = subprocess.run(
        [HOOK, vmid, phase],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": path_with(program)},
    )
    return Ran(ran.returncode, ran.stdout, ran.stderr)


def test_an_unfinished_merge_keeps_a_guest_from_starting(tmp_path: Path, program: Path) -> None:
    base, top, _ = chain(tmp_path, ("base", "snap1", "active"), mib=8)
    assert asked(program).status == 0
    kill_while_copying(base, "--base", str(base), str(top))
    ran = asked(program)
    assert ran.status == 1
    assert (
        f"the merge of {top} into {base} is not finished; finish it: `chainmerge merge" in ran.err
    )
    assert asked(program, "post-stop").status == 0


def test_a_guest_that_is_not_known_starts(program: Path) -> None:
    ran = asked(program, vmid="101")
    assert (ran.status, ran.out) == (0, "")
    assert "guest 101 starts unchecked: qm config 101 ended with status 1" in ran.err
