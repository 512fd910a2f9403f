# SPDX-License-Identifier: Apache-2.0
"""What the command line of a running QEMU says of how it is reached; of hints, not of decisions."""

from __future__ import annotations

import itertools
import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_DEVICE_NOT_KNOWN: Final = "DEVICE"
# QEMU writes a comma in a value as two.
_PARTS: Final = re.compile(r"(?:[^,]|,,)+")


def live_merge_by(process: int) -> str:
    """The command that merges in the VM that a process is; empty if that cannot be told.

    TOP, and where there are several disks the device, are left to whoever knows them.
    """
    try:
        arguments = os.fsdecode(Path(f"/proc/{process}/cmdline").read_bytes()).split("\0")
    except OSError:
        return ""
    options = way_into(arguments)
    command = "chainmerge live merge"
    return f"{command} {options} TOP" if options else ""


def way_into(arguments: Sequence[str]) -> str:
    """The options of ``chainmerge live`` for a QEMU that was started with *arguments*."""
    pairs = list(itertools.pairwise(arguments))
    name = next((_named(value) for option, value in pairs if option == "-name"), "")
    chardevs = {
        fields.get("id", ""): fields
        for option, value in pairs
        if option == "-chardev" and (fields := _fields(value))
    }
    if name and "charmonitor" in chardevs:
        return f"--domain {shlex.quote(name)} --disk TARGET"
    for socket in _sockets(pairs, chardevs):
        return f"--qmp {shlex.quote(socket)} --device {shlex.quote(_device(pairs))}"
    return ""


def _sockets(
    pairs: Sequence[tuple[str, str]], chardevs: dict[str, dict[str, str]]
) -> Iterator[str]:
    """The Unix sockets on which QMP is spoken; those that were handed over open have no path."""
    for option, value in pairs:
        first = next(iter(_fields(value)), "")
        if option in {"-qmp", "-qmp-pretty"} and first.startswith("unix:/"):
            yield first.removeprefix("unix:")
        if option == "-mon" and _fields(value).get("mode") == "control":
            path = chardevs.get(_fields(value).get("chardev", first), {}).get("path", "")
            if path.startswith("/"):
                yield path


def _device(pairs: Sequence[tuple[str, str]]) -> str:
    """The id of the disk, if there is only one."""
    devices = [_fields(value) for option, value in pairs if option == "-device"]
    disks = [fields["id"] for fields in devices if "drive" in fields and "id" in fields]
    return disks[0] if len(disks) == 1 else _DEVICE_NOT_KNOWN


def _named(value: str) -> str:
    """What ``-name`` calls a VM: ``web``, or ``guest=web``, and more that follows."""
    fields = _fields(value)
    return fields.get("guest") or next((name for name in fields if not fields[name]), "")


def _fields(value: str) -> dict[str, str]:
    """The value of an option as names and what is behind their equals sign."""
    parts = (part.replace(",,", ",").partition("=") for part in _PARTS.findall(value))
    return {name: text for name, _, text in parts}
