# SPDX-License-Identifier: Apache-2.0
"""What can go wrong between us and a running VM.

::

    VmUnreachable       Refused         no connection, before anything was changed
    VmRefused           Failed          it answered a command with an error
    VmLost              OutcomeUnknown  it went away in the middle of a merge
    ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from chainmerge.errors import Failed, Misuse, OutcomeUnknown, Refused

_GUEST = (
    "The guest reads and writes its disk all the time, and does not notice. "
    "The active image is what it was."
)


@dataclass(eq=False)
class VmUnreachable(Refused):
    """The VM does not answer."""

    code: ClassVar[str] = "vm-unreachable"
    template: ClassVar[str] = "{vm} does not answer: {reason}"
    hint: ClassVar[str] = (
        "see whether the VM runs and nobody else is connected to this monitor; the images of a "
        "VM that does not run are merged by `chainmerge merge`"
    )
    explanation: ClassVar[str] = (
        "A live merge is done by the VM's own QEMU, which is told so over its monitor (QMP). A "
        "monitor talks to one client at a time: others wait until that one has gone. Nothing "
        "was changed."
    )
    vm: str
    reason: str


@dataclass(eq=False)
class VmRefused(Failed):
    """The VM answered a command with an error."""

    code: ClassVar[str] = "vm-refused"
    template: ClassVar[str] = "{vm} refused {command}: {reason}"
    hint: ClassVar[str] = (
        "remove the reason that QEMU gives, then run the same command again; `chainmerge live "
        "status` tells what is unfinished"
    )
    explanation: ClassVar[str] = (
        "QEMU was asked to do something and declined, with the reason shown. A command that was "
        "refused has changed nothing by itself. " + _GUEST
    )
    vm: str
    command: str
    reason: str


@dataclass(eq=False)
class VmLost(OutcomeUnknown):
    """The VM, or the connection to it, went away in the middle of a merge."""

    code: ClassVar[str] = "vm-lost"
    template: ClassVar[str] = (
        "{vm} went away while {top} was being merged into {base}: {reason}; what it did last is "
        "not known"
    )
    hint: ClassVar[str] = "if the VM runs: {resume}; if it does not: {cold}"
    explanation: ClassVar[str] = (
        "The connection to the VM broke, or it did not answer in time. The VM may run and go on "
        "with the merge, or be dead: both leave images that are right. What was done so far is in "
        "a journal beside base; the command for the one case looks at the VM and goes on, the one "
        "for the other looks at the images."
    )
    vm: str
    base: str
    top: str
    reason: str
    resume: str
    cold: str


@dataclass(eq=False)
class NoSuchDisk(Misuse):
    """The VM has no such disk."""

    code: ClassVar[str] = "vm-no-such-disk"
    template: ClassVar[str] = "{vm} has no disk {wanted!r}; it has: {known}"
    hint: ClassVar[str] = "name one of those with --device, or the active image's node with --node"
    explanation: ClassVar[str] = (
        "--device takes the id of the guest's device (or, in older command lines, of its drive), "
        "--node the node name of its active image, as `query-block` and `query-named-block-nodes` "
        "show them."
    )
    vm: str
    wanted: str
    known: str
