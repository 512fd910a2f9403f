# SPDX-License-Identifier: Apache-2.0
"""Whether a running VM has the very files open that stand at the paths of its images.

QEMU tells names. A file that was replaced under its name (restored, deduplicated, moved by a
synchronising tool) goes on living as long as QEMU has it open: QEMU would merge into what is gone
when it ends, and we would look at, re-point and delete what it has never seen. What it has open
the kernel tells, of a process of this machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.live.errors import LiveImageExchanged
from chainmerge.storage.bystanders import Wanted, files_open_in, key_of
from chainmerge.storage.locks import LockMode
from chainmerge.storage.other_users import look_for_others

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from chainmerge.live.port import InspectedVm
    from chainmerge.live.target import LiveTarget
    from chainmerge.options import LiveOptions
    from chainmerge.storage.other_users import OtherUsers


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
        try:
            is_open = key_of(path.stat()) in opened
        except FileNotFoundError:
            is_open = False
        except OSError:
            # Why it cannot be looked at is said where it has to be.
            continue
        if not is_open:
            raise LiveImageExchanged(vm.name, str(path), str(process))


def uncertain(vm: InspectedVm) -> Iterator[str]:
    """Says so where it cannot be told whether images were exchanged."""
    process = vm.process
    if process is None or files_open_in(process) is None:
        yield (
            f"the process of {vm.name} cannot be examined from here: whether it has the files at "
            "these paths open is not known"
        )


def others_beside(vm: InspectedVm, live: LiveTarget, options: LiveOptions) -> OtherUsers:
    """Who else, beside the VM, uses the images that its merge writes to or deletes."""
    process = vm.process
    lower = (live.target.base, *live.merged_images[:-1])
    # A pull leaves them as they are, for whoever else reads them.
    stays = options.pulls and not options.delete
    images = [Wanted(one.path, LockMode.READER if stays else LockMode.WRITER) for one in lower]
    images.append(Wanted(live.target.chain.top.path, LockMode.WRITER))
    images += [Wanted(image.path, LockMode.READER) for image in live.above]
    known = frozenset() if process is None else frozenset({process})
    (found,) = look_for_others([images], known)
    return found
