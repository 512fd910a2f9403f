# SPDX-License-Identifier: Apache-2.0
"""What other processes are, as ``/proc`` tells."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def process_name(process: int) -> str:
    """A process, as messages call it: a VM by the name that it was given."""
    name = program_of(process) or "a process"
    guest = guest_name(started_with(process)) if name.startswith(("qemu-system", "kvm")) else None
    if guest is not None:
        name = f"the VM {guest!r}, {name}"
    return f"{name} (pid {process})"


def program_of(process: int) -> str:
    """The name of a process's program; empty if the process is gone."""
    try:
        # QEMU names its threads; "comm" of the process is the program's name, 15 bytes of it.
        return Path(f"/proc/{process}/comm").read_text(errors="replace").strip()
    except OSError:
        return ""


def started_with(process: int) -> tuple[str, ...]:
    """The words that a process was started with; none if that cannot be read."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return ()
    return tuple(word.decode("utf-8", "surrogateescape") for word in words.split(b"\0")[:-1])


def values_of(option: str, words: Sequence[str]) -> tuple[str, ...]:
    """What QEMU was given by an option, such as ``name``, each time; dashes may be one or two."""
    spellings = {f"-{option}", f"--{option}"}
    return tuple(value for word, value in pairwise(words) if word in spellings)


def properties_of(value: str, implied: str) -> dict[str, str]:
    """The value of an option of QEMU, ``a=b,c=d``; a comma in a value is written twice.

    Args:
        value: as it was given.
        implied: the property that the first word is if it has no name.
    """
    parts = value.replace(",,", "\0").split(",")
    found: dict[str, str] = {}
    for number, part in enumerate(parts):
        name, equals, text = part.replace("\0", ",").partition("=")
        if not equals and number == 0:
            name, text = implied, name
        found[name] = text if equals or number == 0 else "on"
    return found


def guest_name(words: Sequence[str]) -> str | None:
    """The name that QEMU was given for its guest; None if it has none."""
    for value in reversed(values_of("name", words)):
        return properties_of(value, "guest").get("guest") or None
    return None
