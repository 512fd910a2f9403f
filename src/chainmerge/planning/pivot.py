# SPDX-License-Identifier: Apache-2.0
"""Whether a VM went over from top to base, in a live merge that was not finished.

From then on the guest wrote to base, and nothing must be copied from top any more.
"""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING, ClassVar

import msgspec

from chainmerge.errors import NewerDataAtRisk, OutcomeUnknown, Refused
from chainmerge.records.changes import data_changed
from chainmerge.records.identity import identify, may_be_same, same_image
from chainmerge.records.request import command_of

if TYPE_CHECKING:
    from chainmerge.chain.target import Target
    from chainmerge.options import Access, MergeOptions
    from chainmerge.records.live_journal import LiveJournal
    from chainmerge.records.request import RecordedRequest


class LivePivotUnclear(NewerDataAtRisk, OutcomeUnknown):
    """The guest wrote last to top or to base, and the images do not show to which."""

    code: ClassVar[str] = "live-pivot-unclear"
    template: ClassVar[str] = (
        "a live merge of {top} into {base} was about to take effect; the two differ, and {top} "
        "may have been written to since"
    )
    hint: ClassVar[str] = (
        "find out which of them the VM used last, then run `{if_base}` if it was {base} (it was, "
        "unless the VM was started again with {top}), otherwise `{if_top}`"
    )
    explanation: ClassVar[str] = (
        "When the active layer has been merged, the VM switches from top to base, and the journal "
        "of the merge announces that right before. From then on base is the right one, unless the "
        "VM ended and was started with top again. Modification times show that for files that "
        "nobody has touched since; for block devices nothing shows it. Copying top into base could "
        "destroy what the guest has written. Nothing was changed."
    )
    top: str
    base: str
    if_base: str
    if_top: str


class LivePivotUnfinished(NewerDataAtRisk, Refused):
    """Top was to be the result, but a live merge has left it behind."""

    code: ClassVar[str] = "live-pivot-unfinished"
    template: ClassVar[str] = (
        "a live merge of {top} into {base} has taken effect: since then the guest has written to "
        "{base}, and {top} cannot become the merged image"
    )
    hint: ClassVar[str] = (
        "finish that merge first: `{finish}`; continue with {base}, not with {top}, which lacks "
        "what the guest has written since"
    )
    explanation: ClassVar[str] = (
        "When the active layer has been merged, the VM switches from top to base. That merge was "
        "interrupted before its end, so top still exists, with base below it, but its data is old. "
        "A pull, or --keep-name, would give the result its name. Nothing was changed."
    )
    top: str
    base: str
    finish: str


def pivot_unclear(request: RecordedRequest) -> LivePivotUnclear:
    """The error that nobody knows which image the guest wrote to, with commands that say it."""
    top, base = request.tops[-1], request.bases[-1]
    if_base, if_top = (
        command_of(msgspec.structs.replace(request, access={**request.access, "active": active}))
        for active in (base, top)
    )
    return LivePivotUnclear(top, base, if_base or f"--active {base}", if_top or f"--active {top}")


def base_was_written_last(journal: LiveJournal, target: Target, access: Access) -> bool | None:
    """Whether base is what the guest wrote to last, after the live merge of *journal*.

    None if only a look at what both show could tell.
    """
    top, base = target.chain.top, target.base
    if not may_be_same(journal.top, identify(top.real_path)):
        return False
    if access.active is not None:
        return os.path.realpath(access.active) == str(base.real_path)
    images = ((journal.base, base), (journal.top, top))
    are_the_same = all(same_image(then, identify(now.real_path)) for then, now in images)
    if are_the_same and journal.top_since and journal.top_since == data_changed(top.real_path):
        return True
    return None


def require_base_as_result(journal: LiveJournal, target: Target, options: MergeOptions) -> None:
    """Raise LivePivotUnfinished where the result is to be under top's name."""
    if options.direction != "pull" and not options.keep_name:
        return
    known = journal.known_request
    finish = command_of(known) or f"chainmerge merge {shlex.quote(known.tops[-1])}"
    raise LivePivotUnfinished(known.tops[-1], str(target.base.path), finish)
