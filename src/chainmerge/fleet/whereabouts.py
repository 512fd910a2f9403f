# SPDX-License-Identifier: Apache-2.0
"""Which virtual machines run on this host.

As a program it prints them, by UUID: a worker asks by a process of its own, so that neither
libvirt's library stays in its memory, nor a libvirt that hangs holds it up.
"""

from __future__ import annotations

import sys

import msgspec

from chainmerge.errors import ChainmergeError
from chainmerge.live.libvirt.domains import running_domains


def print_domains_here(uri: str) -> int:
    """Print the UUIDs of the domains that run here.

    Returns the exit status: that of the error if libvirt does not say.
    """
    try:
        found = [one.uuid for one in running_domains(uri)]
    except ChainmergeError as error:
        sys.stderr.write(f"{error.sentence}\n")
        return int(error.exit_code)
    sys.stdout.buffer.write(msgspec.json.encode(found))
    return 0


if __name__ == "__main__":
    sys.exit(print_domains_here(sys.argv[1]))
