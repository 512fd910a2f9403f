# SPDX-License-Identifier: Apache-2.0
"""Which image is spoiled, and what takes its place."""

from __future__ import annotations

import random
from typing import Final

from tests.support.images import KIB

ROLES: Final = ("root", "base", "top")


GARBAGE: Final = {
    "nothing": b"",
    "zeros": bytes(64 * KIB),
    "noise": random.Random(1).randbytes(64 * KIB),
    "text": b"Lorem ipsum\n" * 1000,
    "only the magic": b"QFI\xfb",
    "noise after the magic": b"QFI\xfb\0\0\0\3" + random.Random(2).randbytes(64 * KIB),
    "version 1": b"QFI\xfb\0\0\0\1" + bytes(64 * KIB),
}
