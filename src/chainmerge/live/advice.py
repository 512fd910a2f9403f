# SPDX-License-Identifier: Apache-2.0
"""What to do about an error, where the images are open in a running VM.

Most errors of a plan can meet any merge, and say what to do about closed images: options that a
live merge does not have, tools that change images, of which none may touch these now. That stays
right once the VM is stopped, and this is said first.
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Final

from chainmerge.documents.plan import Finding
from chainmerge.errors import ChainmergeError
from chainmerge.options import Access, LiveOptions

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_STOP_FIRST: Final = "not while the VM runs: stop it, and use `chainmerge merge`; there, "
_OPTION: Final = re.compile(r"--([a-z][a-z-]*)")
_TOOLS: Final = re.compile(r"qemu-img|chainmerge (?:bitmaps|flatten|relink|repair)\b")
_OURS: Final = frozenset(
    {"base", "format"}
    | {name.replace("_", "-") for kind in (Access, LiveOptions) for name in kind.__struct_fields__}
)


def for_running_vm(error: ChainmergeError) -> ChainmergeError:
    """The same error, whose advice does not lead anybody to change what a VM has open."""
    if type(error).__module__.startswith("chainmerge.live."):
        return error
    advice = error.advice
    if _TOOLS.search(advice) or not _OURS.issuperset(_OPTION.findall(advice)):
        return error.advised(_STOP_FIRST)
    return error


def findings_for_running_vm(errors: Iterable[ChainmergeError]) -> tuple[Finding, ...]:
    """What a plan says of errors, with such advice."""
    return tuple(Finding.of(for_running_vm(error)) for error in errors)


@contextlib.contextmanager
def advice_for_running_vm() -> Iterator[None]:
    """Errors that come from within are raised with such advice."""
    try:
        yield
    except ChainmergeError as error:
        advised = for_running_vm(error)
        if advised is error:
            raise
        raise advised.with_traceback(error.__traceback__) from error.__cause__
