# SPDX-License-Identifier: Apache-2.0
"""Whether a running VM has the very files open that stand at the paths of its images.

QEMU tells names. A file that was replaced under its name (restored, deduplicated, moved by a
synchronising tool) goes on living as long as QEMU has it open: QEMU would merge into what is gone
when it ends, and we would look at, re-point and delete what it has never seen. What it has open
the kernel tells, of a process of this machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from chainmerge.live.errors import LiveImageExchanged
from chainmerge.other_users import look_for_others
from chainmerge.storage.bystanders import Wanted, files_open_in, key_at
from chainmerge.storage.locks import LockMode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from chainmerge.live.inspection import LiveTarget
    from chainmerge.live.port import InspectedVm
    from chainmerge.other_users import OtherUsers

_QEMU: Final = ("qemu", "kvm")


def process_if_qemu(process: int) -> int | None:
    """*process*, if it is a QEMU: who listens at a socket can be one who only passes it on."""
    try:
        name = Path(f"/proc/{process}/exe").readlink().name if process else ""
    except OSError:
        return None
    return process if any(word in name for word in _QEMU) else None


def process_of_domain(uuid: str) -> int | None:
    """The QEMU that libvirt has started for the domain with that UUID, if it is on this machine."""
    wanted = [b"-uuid", uuid.encode()]
    for place in Path("/proc").iterdir():
        if not place.name.isdecimal():
            continue
        try:
            words = (place / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(words[at : at + 2] == wanted for at in range(len(words) - 1)):
            found = process_if_qemu(int(place.name))
            if found is not None:
                return found
    return None


def require_same_files(vm: InspectedVm, paths: Iterable[Path]) -> None:
    """Make sure that what stands at *paths* is what the VM has open, as far as can be told.

    Raises:
        LiveImageExchanged: it is not.
    """
    process = vm.process
    opened = None if process is None else files_open_in(process)
    if opened is None:
        return
    for path in paths:
        if key_at(path) not in opened:
            raise LiveImageExchanged(vm.name, str(path), str(process))


def uncertain(vm: InspectedVm) -> Iterator[str]:
    """Says so where it cannot be told whether images were exchanged."""
    process = vm.process
    if process is None or files_open_in(process) is None:
        yield (
            f"the process of {vm.name} cannot be looked at from here: whether it has the files "
            "open that are at these paths is not known"
        )


def others_beside(vm: InspectedVm, live: LiveTarget) -> OtherUsers:
    """Who else, beside the VM, uses the images that its merge writes to or deletes."""
    process = vm.process
    images = [Wanted(image.path, LockMode.WRITER) for image in live.merged_images]
    images = [Wanted(live.target.base.path, LockMode.WRITER), *images]
    images += [Wanted(image.path, LockMode.READER) for image in live.above]
    known = frozenset() if process is None else frozenset({process})
    (found,) = look_for_others([images], known)
    return found
