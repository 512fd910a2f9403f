# SPDX-License-Identifier: Apache-2.0
"""The backing format that QEMU writes where a raw base has no format node.

The storage daemon stands for the VM: it can be had of a newer QEMU too (``make test QEMU=DIR``).
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from typing import TYPE_CHECKING, Any

from chainmerge import live
from chainmerge.live.qmp.qmp_schema import takes_argument
from chainmerge.options import LiveOptions
from tests.support.live_scenario import DISK
from tests.support.live_vm import listening
from tests.support.machine import qemu_major
from tests.support.nbd import NbdClient
from tests.support.qemu import content, create, info, qemu_io

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

MASKING = 9
"""The major version of QEMU from which on protocols are not declared."""


def test_what_a_command_takes() -> None:
    schema: list[dict[str, Any]] = [
        {"name": "block-commit", "meta-type": "command", "arg-type": "7", "ret-type": "0"},
        {"name": "quit", "meta-type": "command", "arg-type": "0", "ret-type": "0"},
        {"name": "0", "meta-type": "object", "members": []},
        {"name": "7", "meta-type": "object", "members": [{"name": "speed", "type": "int"}]},
        {"name": "any", "meta-type": "builtin"},
    ]
    assert takes_argument(schema, "block-commit", "speed")
    assert not takes_argument(schema, "block-commit", "mask")
    assert not takes_argument(schema, "quit", "speed")
    assert not takes_argument(schema, "block-stream", "speed")


def declared_for_raw() -> str:
    return "raw" if qemu_major() >= MASKING else "file"


@contextlib.contextmanager
def running_daemon(directory: Path, images: Sequence[Path]) -> Iterator[live.QmpVm]:
    """The chain *images* open in a storage daemon, root first and without a format node."""
    base, *upper = images
    file = {"driver": "file", "filename": str(base), "read-only": True, "auto-read-only": True}
    nodes: list[dict[str, object]] = [{**file, "node-name": "i0"}]
    for index, image in enumerate(upper, 1):
        nodes.append(
            {
                "driver": "qcow2",
                "node-name": f"i{index}",
                "read-only": image != images[-1],
                "file": {"driver": "file", "filename": str(image), "auto-read-only": True},
                "backing": f"i{index - 1}",
            }
        )
    options = [word for node in nodes for word in ("--blockdev", json.dumps(node))]
    export = f"type=nbd,id=guest,name=disk,writable=on,node-name=i{len(upper)}"
    with listening(directory / "qmp") as qmp, listening(directory / "nbd") as nbd:
        process = subprocess.Popen(
            [
                "setpriv", "--pdeathsig", "KILL", "--", "qemu-storage-daemon", *options,
                "--chardev", f"socket,id=qmp,fd={qmp.fileno()},server=on,wait=off",
                "--monitor", "chardev=qmp",
                "--nbd-server", f"addr.type=fd,addr.str={nbd.fileno()}", "--export", export,
            ],
            stdin=subprocess.DEVNULL,
            pass_fds=[qmp.fileno(), nbd.fileno()],
        )  # fmt: skip
    try:
        with live.QmpVm(str(directory / "qmp"), node=f"i{len(upper)}") as disk:
            yield disk
    finally:
        process.terminate()
        assert process.wait(60) == 0


def test_the_image_above_declares_a_raw_base(tmp_path: Path) -> None:
    base = create(tmp_path / "base.raw", DISK, fmt="raw")
    qemu_io(base, "write -q -P 1 0 8M", fmt="raw")
    top = create(tmp_path / "top.qcow2", backing=base, backing_format="raw")
    qemu_io(top, "write -q -P 2 4M 8M")
    leaf = create(tmp_path / "leaf.qcow2", backing=top)
    before = bytearray(content(leaf))
    with running_daemon(tmp_path, [base, top, leaf]) as disk:
        with NbdClient(tmp_path / "nbd", "disk") as guest:
            guest.write(1 << 20, b"\x77" * 512)
        live.merge(disk, top, options=LiveOptions(delete=True))
    before[1 << 20 : (1 << 20) + 512] = b"\x77" * 512
    assert info(leaf)["backing-filename-format"] == declared_for_raw()
    assert content(leaf) == before


def test_top_declares_a_raw_image_that_it_stands_on_after_a_pull(tmp_path: Path) -> None:
    root = create(tmp_path / "root.raw", DISK, fmt="raw")
    qemu_io(root, "write -q -P 1 0 8M", fmt="raw")
    base = create(tmp_path / "base.qcow2", backing=root, backing_format="raw")
    qemu_io(base, "write -q -P 2 4M 8M")
    top = create(tmp_path / "top.qcow2", backing=base)
    before = bytearray(content(top))
    with running_daemon(tmp_path, [root, base, top]) as disk:
        with NbdClient(tmp_path / "nbd", "disk") as guest:
            guest.write(1 << 20, b"\x77" * 512)
        live.merge(disk, top, options=LiveOptions(direction="pull"))
    before[1 << 20 : (1 << 20) + 512] = b"\x77" * 512
    assert info(top)["backing-filename"] == str(root)
    assert info(top)["backing-filename-format"] == declared_for_raw()
    assert content(top) == before
