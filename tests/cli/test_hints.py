# SPDX-License-Identifier: Apache-2.0
"""What is printed as advice: nothing in it destroys anything if it is followed as it stands."""

from __future__ import annotations

import re

import pytest

from chainmerge.catalogue import known_errors

ERRORS = known_errors()
# What each would cost where the situation is not what it looks like.
DESTRUCTIVE = {
    r"rebase\b": "opens the image for writing, and a kill costs its checkpoints",
    r"qemu-img commit": "writes base, and loses checkpoints",
    r"--shrink \{": "cuts off what a guest has behind the new end",
    r"resize\b": "changes a guest's disk",
    r"--setrw": "lvm goes on having the volume read-only, and others may rely on it",
    r"\bkill -|kill \{": "a writer that is killed leaves half of what it wrote",
    r"--force\b": "makes false checkpoints",
    r"\brm\b|losetup -d": "removes what may be needed",
    r"repair \{image\} --yes|repair --yes \{image\}": "mends what nobody has looked at",
    r"snapshot -d": "deletes what people keep on purpose",
    # Internal snapshots are copied out like that, before anything is done about them.
    r"(?<!not )qemu-img convert(?! -O qcow2 -l)(?!.*keep)": "a copy has no bitmaps, no snapshots",
}
# These have other owners, or say in the same sentence what it costs.
KNOWN = {("internal-snapshots", r"snapshot -d")}


@pytest.mark.parametrize("code", ERRORS)
def test_no_hint_destroys(code: str) -> None:
    hint = ERRORS[code].hint
    found = {
        words: cost
        for words, cost in DESTRUCTIVE.items()
        if re.search(words, hint) and (code, words) not in KNOWN
    }
    assert not found, hint
