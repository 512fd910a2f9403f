# SPDX-License-Identifier: Apache-2.0
"""A merge into a base that already shows what top shows, but has other bitmaps than it should.

That happens when a range is merged once more and the images between still exist, or when an engine
that copies first was interrupted. Nothing is copied again.
"""

from __future__ import annotations

from chainmerge.bitmaps.sets import final_set
from chainmerge.chain.opening import open_chain
from chainmerge.chain.reading import open_for_writing
from chainmerge.documents.progress import Stage
from chainmerge.engines.metadata.errors import NotEnoughSpace
from chainmerge.engines.metadata.replacement import replace_bitmaps
from chainmerge.merging.deciding import find_target_of
from chainmerge.merging.job import Job, leaks_reclaimed, note_what_base_lacks
from chainmerge.merging.journal import journal_until_settled
from chainmerge.merging.verifying import verify_bitmaps, verify_metadata


def merge_bitmaps(job: Job) -> tuple[str, ...] | None:
    """Give base its bitmaps; returns what was verified, in sentences.

    None if there is no room for them beside those that base has: a merge that has its volume
    extended, or takes stale ones out first, finds it.

    Raises what :func:`chainmerge.engines.metadata.replacement.replace_bitmaps` raises, and
    VerificationFailed.
    """
    job.request.announce(Stage.BITMAPS)
    final = final_set(job.bitmaps, job.plan.virtual_size_after)
    with journal_until_settled(job), leaks_reclaimed(job):
        note_what_base_lacks(job)
        try:
            with open_for_writing(job.base) as port:
                replace_bitmaps(port, final)
        except NotEnoughSpace:
            return None
    job.request.announce(Stage.VERIFY)
    target = find_target_of(job.request)
    with open_chain(target.chain, job.locks) as opened:
        image = opened.images[target.base_index].image
        assert image is not None
        return (
            "base already holds all of top's data",
            verify_metadata(image, job.leaks.kept),
            verify_bitmaps(image, final),
        )
