# SPDX-License-Identifier: Apache-2.0
"""A small chain, and the names of what is found of one."""

from pathlib import Path

from chainmerge.chain.discovery import discover
from chainmerge.chain.model import ChainPolicy

PLAIN = ChainPolicy()


def names(top: Path, policy: ChainPolicy = PLAIN) -> list[str]:
    return [image.path.name for image in discover(top, policy).images]
