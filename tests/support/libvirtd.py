# SPDX-License-Identifier: Apache-2.0
"""A libvirtd of one's own: the real one in its system mode, with private directories.

It runs in a mount namespace of its own, in which the directories that are compiled into it
(``/etc/libvirt``, ``/run/libvirt``, ...) are others than the machine's, so that it meets no
other libvirtd and leaves nothing behind. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PRIVATE: Final = {
    "etc": "/etc/libvirt",
    "lib": "/var/lib/libvirt",
    "run": "/run",
    "cache": "/var/cache/libvirt",
    "log": "/var/log/libvirt",
}

# Guests run as root, in no cgroup and under no security driver: they are only there to write.
_QEMU_CONF: Final = """\
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
stdio_handler = "file"
cgroup_controllers = [ ]
namespaces = [ ]
"""
_LIBVIRTD_CONF: Final = """\
auth_unix_rw = "none"
auth_unix_ro = "none"
"""
# The socket is ours and handed over as systemd does it: a connection can be made at once,
# and is answered when the daemon has started.
_START: Final = """\
exec 3<&"$1"
shift
for pair in "$@"; do
    mkdir -p "${pair#*=}"
    mount --bind "${pair%%=*}" "${pair#*=}" || exit 1
done
(
    export LISTEN_PID=$BASHPID LISTEN_FDS=1 LISTEN_FDNAMES=libvirtd.socket
    exec libvirtd
) &
wait
"""


@contextlib.contextmanager
def libvirtd(directory: Path, *, hook: str = "", path: str | None = None) -> Iterator[str]:
    """Run a libvirtd with everything in *directory*; gives the URI to connect to.

    Its guests are killed with it.

    Args:
        hook: the script that it asks before it starts a domain; empty for none.
        path: the PATH of the daemon and of its hook, if that is another one.
    """
    pairs = []
    for name, place in _PRIVATE.items():
        private = directory / name
        private.mkdir(parents=True)
        pairs.append(f"{private}={place}")
    (directory / "etc" / "qemu.conf").write_text(_QEMU_CONF)
    (directory / "etc" / "libvirtd.conf").write_text(_LIBVIRTD_CONF)
    if hook:
        script = directory / "etc" / "hooks" / "qemu"
        script.parent.mkdir()
        script.write_text(hook)
        script.chmod(0o755)
    address = directory / "socket"
    with (
        socket.socket(socket.AF_UNIX) as listener,
        (directory / "messages").open("wb") as messages,
    ):
        listener.bind(os.fspath(address))
        listener.listen()
        daemon = subprocess.Popen(
            [
                *("unshare", "--mount", "--propagation", "private"),
                *("--pid", "--fork", "--mount-proc", "--kill-child"),
                *("bash", "-c", _START, "libvirtd", str(listener.fileno()), *pairs),
            ],
            stdin=subprocess.DEVNULL,
            stdout=messages,
            stderr=messages,
            pass_fds=(listener.fileno(),),
            env=None if path is None else {**os.environ, "PATH": path},
        )
        # Only the daemon's own copy is left: if it dies, connections are refused at once.
        listener.close()
        try:
            yield f"qemu+unix:///system?socket={address}"
        finally:
            daemon.kill()
            daemon.wait()
