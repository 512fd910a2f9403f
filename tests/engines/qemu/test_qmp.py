# SPDX-License-Identifier: Apache-2.0
"""The QMP client at real sockets: of a QEMU, and of those that are none."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

from chainmerge.engines.qemu.qmp import Qmp, QmpLost, QmpRefused

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Our end of a connection, and theirs."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@contextlib.contextmanager
def storage_daemon(theirs: socket.socket) -> Iterator[subprocess.Popen[bytes]]:
    """A QEMU that speaks QMP at a socket."""
    fd = theirs.fileno()
    command = ["qemu-storage-daemon", "--chardev", f"socket,id=qmp,fd={fd}"]
    with subprocess.Popen([*command, "--monitor", "chardev=qmp"], pass_fds=[fd]) as process:
        theirs.close()
        try:
            yield process
        finally:
            process.kill()


def test_what_qemu_answers_and_refuses(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    with storage_daemon(theirs), Qmp(ours, 10) as qmp:
        assert qmp.execute("query-block-jobs") == []
        with pytest.raises(QmpRefused, match="no-such-command"):
            qmp.execute("no-such-command")
        assert qmp.next_event(0.05) is None
        qmp.execute("object-add", {"qom-type": "iothread", "id": "thread"})


def test_events_are_told_once_and_can_be_dropped(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = ends
    null = {"driver": "null-co", "size": 1 << 20}
    with storage_daemon(theirs), Qmp(ours, 10) as qmp:
        for name in ("source", "target"):
            qmp.execute("blockdev-add", {**null, "node-name": name})
        backup = {"device": "source", "target": "target", "sync": "full"}
        qmp.execute("blockdev-backup", {**backup, "job-id": "first"})
        assert qmp.next_event(10) == "JOB_STATUS_CHANGE"
        while qmp.next_event(10) != "BLOCK_JOB_COMPLETED":
            pass
        while qmp.execute("query-jobs"):
            qmp.next_event(1)
        qmp.drop_events()
        assert qmp.next_event(0.05) is None


def test_a_qemu_that_is_gone(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    with storage_daemon(theirs) as process, Qmp(ours, 10) as qmp:
        process.kill()
        process.wait()
        with pytest.raises(QmpLost):
            qmp.execute("query-block-jobs")


GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""},'
    b' "capabilities": ["oob"]}}\r\n'
)


@pytest.mark.parametrize(
    "answer", [b"nonsense", b'"' + b"x" * (12 << 20) + b'"', b"[" * 100_000], ids=len
)
def test_an_answer_that_cannot_be_read(
    ends: tuple[socket.socket, socket.socket], answer: bytes
) -> None:
    ours, theirs = ends

    def answer_everything() -> None:
        theirs.sendall(GREETING)
        theirs.recv(4096)
        theirs.sendall(b'{"return": {}}\r\n')
        theirs.recv(4096)
        # The other end hangs up in the middle of it.
        with contextlib.suppress(OSError):
            theirs.sendall(answer + b"\r\n")

    threading.Thread(target=answer_everything, daemon=True).start()
    with Qmp(ours, 10) as qmp, pytest.raises(QmpLost):
        qmp.execute("query-jobs", None, 10)


def test_nobody_greets(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, _ = ends
    with pytest.raises(QmpLost, match="no answer within 0 s"):
        Qmp(ours, 0.1)


@pytest.mark.parametrize("greeting", [b"", b"220 mail.example.com ESMTP\r\n"])
def test_somebody_who_speaks_no_qmp(
    ends: tuple[socket.socket, socket.socket], greeting: bytes
) -> None:
    ours, theirs = ends
    theirs.sendall(greeting)
    theirs.close()
    with pytest.raises(QmpLost):
        Qmp(ours)


def test_an_answer_that_does_not_come_in_time(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    with (
        storage_daemon(theirs),
        Qmp(ours, 10) as qmp,
        pytest.raises(QmpLost, match="no answer within 0 s"),
    ):
        qmp.execute("query-block-jobs", answer_seconds=0)
