# SPDX-License-Identifier: Apache-2.0
"""Whether a chain is still what it was when a scan saw it.

That is judged by what the kernel says of its files, and not by what a merge of them would do: a
plan from the inventory is made where no image can be read, and with options that the scan did not
know. So nothing here reads an image, but for the beginning of a block device, which has no times.
"""

from __future__ import annotations

import hashlib
import os
import stat
from typing import TYPE_CHECKING, Final

from chainmerge.fleet.places import base_id_of
from chainmerge.fleet.record import Action

if TYPE_CHECKING:
    from collections.abc import Sequence

_LENGTH: Final = 32
_BEGINNING: Final = 64 << 10
"""Bytes of a device: the header of its image, with its backing name."""


def digest_of_idle_chain(paths: Sequence[str]) -> str:
    """Return the same for as long as nobody writes to any image of a chain.

    Args:
        paths: its images from the root up to the leaf, or a part of them, always the same one.

    Raises OSError if one of them cannot be looked at.
    """
    return _hashed([(path, base_id_of(path), _stamp(path)) for path in paths])


def digest_of_running_chain(paths: Sequence[str]) -> str:
    """As above, of a chain whose leaf a guest writes to: that it does is no change."""
    *below, leaf = paths
    return _hashed([digest_of_idle_chain(below), leaf, base_id_of(leaf)])


def digest_of_chains(action: Action, chains: Sequence[Sequence[str]]) -> str:
    """Return the digest of the chains of a job, by whether it is for a machine that runs.

    Raises OSError if an image cannot be looked at.
    """
    digest_of = digest_of_running_chain if action is Action.LIVE_MERGE else digest_of_idle_chain
    return joint_digest([digest_of(chain) for chain in chains])


def joint_digest(digests: Sequence[str]) -> str:
    """Return the digest of several chains, the disks of one virtual machine, in their order."""
    return digests[0] if len(digests) == 1 else _hashed(list(digests))


def _stamp(path: str) -> object:
    """Size and time of the last write of a file: its owner changes whenever its guest starts."""
    status = os.stat(path)  # noqa: PTH116
    if not stat.S_ISBLK(status.st_mode):
        return status.st_size, status.st_mtime_ns
    with open(path, "rb") as device:  # noqa: PTH123
        return hashlib.sha256(device.read(_BEGINNING)).hexdigest()


def _hashed(what: object) -> str:
    # Names that are not UTF-8 have no other form that is the same everywhere.
    return hashlib.sha256(ascii(what).encode("ascii")).hexdigest()[:_LENGTH]
