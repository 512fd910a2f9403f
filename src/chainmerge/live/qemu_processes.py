# SPDX-License-Identifier: Apache-2.0
"""Which process is the QEMU of a VM: by a connection to its monitor, or by its domain's UUID.

``SO_PEERCRED`` names the process that made the socket listen. That is not always who accepts:
managers make the socket and hand it to QEMU. The kernel tells which socket is the other end
(``unix_diag``, sock_diag(7)), and ``/proc`` who has that one open.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final

from chainmerge.arithmetic.rounding import round_up
from chainmerge.storage.processes import started_with, values_of

if TYPE_CHECKING:
    from collections.abc import Iterator

# linux/netlink.h, linux/sock_diag.h, linux/unix_diag.h
_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLM_F_REQUEST: Final = 1
_UDIAG_SHOW_PEER: Final = 4
_UNIX_DIAG_PEER: Final = 2
_ALL_STATES: Final = 0xFFFFFFFF
_ANY_COOKIE: Final = 0xFFFFFFFF
_MESSAGE: Final = struct.Struct("=IHHII")
_REQUEST: Final = struct.Struct("=BBHIIIII")
_ANSWER: Final = struct.Struct("=BBBBIII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_CREDENTIALS: Final = struct.Struct("=iII")  # pid, uid, gid: struct ucred of unix(7)

_QEMU: Final = ("qemu", "kvm")
_MACHINES: Final = ("qemu-system", "kvm")


def listener_of(connection: socket.socket) -> int:
    """The id of the process that made the other end listen; 0 if it cannot be seen from here."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(packed)[0])


def qemu_connected_to(number: int, listener: int) -> int | None:
    """The QEMU at the other end of one of our connections; None where there is none to be seen.

    Args:
        number: the inode of our socket.
        listener: the process that made the other one listen.
    """
    if is_qemu(listener):
        return listener
    with contextlib.suppress(OSError, struct.error):
        wanted = f"socket:[{_connected_socket(number)}]"
        return next((one for one in _qemus() if _has_open(one, wanted)), None)
    return None


def qemu_of_domain(uuid: str) -> int | None:
    """The QEMU that libvirt has started for the domain with that UUID, if it is on this machine."""
    found = (one for one in _qemus() if uuid in values_of("uuid", started_with(one)))
    return next(found, None)


def virtual_machines() -> Iterator[int]:
    """The QEMUs that run a machine, and not one of the tools that read images."""
    for process in _qemus():
        if any(word in _program(process) for word in _MACHINES):
            yield process


def is_qemu(process: int) -> bool:
    """Whether a process is a QEMU, and not one who only passes on what it is told."""
    return any(word in _program(process) for word in _QEMU)


def _program(process: int) -> str:
    """The name of a process' program; empty if it cannot be seen from here."""
    try:
        return Path(f"/proc/{process}/exe").readlink().name
    except OSError:
        return ""


def _qemus() -> Iterator[int]:
    for place in Path("/proc").iterdir():
        if place.name.isdecimal() and is_qemu(int(place.name)):
            yield int(place.name)


def _has_open(process: int, wanted: str) -> bool:
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(entry) == wanted:  # noqa: PTH115
                    return True
    return False


def _connected_socket(number: int) -> int:
    """The inode of the socket that one of ours is connected to.

    Raises OSError, struct.error where the kernel does not tell.
    """
    request = _REQUEST.pack(
        socket.AF_UNIX, 0, 0, _ALL_STATES, number, _UDIAG_SHOW_PEER, _ANY_COOKIE, _ANY_COOKIE
    )
    length = _MESSAGE.size + len(request)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG) as kernel:
        kernel.settimeout(1)
        kernel.send(_MESSAGE.pack(length, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + request)
        answer = kernel.recv(1 << 16)
    total, kind, *_ = _MESSAGE.unpack_from(answer)
    if kind != _SOCK_DIAG_BY_FAMILY:
        raise OSError("the kernel does not tell")
    at = _MESSAGE.size + _ANSWER.size
    while at + _ATTRIBUTE.size <= total:
        size, name = _ATTRIBUTE.unpack_from(answer, at)
        if name == _UNIX_DIAG_PEER:
            return int(struct.unpack_from("=I", answer, at + _ATTRIBUTE.size)[0])
        at += max(round_up(size, 4), _ATTRIBUTE.size)
    raise OSError("it has no other end")
