# SPDX-License-Identifier: Apache-2.0
"""The QEMU engine: guest data is copied into base by ``qemu-storage-daemon``.

One process does the whole copy with one active ``block-commit`` job. Only base is open for
writing: QEMU marks every persistent bitmap of an image that it has open for writing as in-use,
and a kill leaves them so. (Checked with QEMU 7.2 and 10.0: with top and the images between
opened read-only, not a byte of them changes.)

The daemon exits with 0 even when it has lost bitmaps while closing. So an outcome counts
as good only if the job ended without an error, every node closed, the process exited
with 0, and it wrote nothing to standard error.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from chainmerge.engines.qemu.daemon import StorageDaemon
from chainmerge.engines.qemu.errors import (
    CommandRefused,
    CommitFailed,
    ConnectionLost,
    DaemonFailed,
)
from chainmerge.engines.qemu.nodes import (
    ImageSpec,
    Names,
    NodeChain,
    Options,
    node_name,
    open_nodes,
    speakable_names,
)
from chainmerge.errors import Interrupted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

JOB = "commit"
SECONDS_BETWEEN_REPORTS = 0.25

# What QEMU puts between the program's name and a message that is not an error.
_HARMLESS = (": warning: ", ": info: ")

# What QEMU adds to the warning about bitmaps that a program without support for them has left
# behind. It has neither a name in front nor a newline at its end.
_REST_OF_A_WARNING = (
    "Some clusters may be leaked, run 'qemu-img check -r' on the image file to fix."
)


class CopyProgress(Struct, frozen=True):
    """How much of the guest data has been copied, in bytes.

    *total* can change: QEMU finds out during the copy what is to be copied.
    """

    done: int
    total: int


class _Outcome(Struct, frozen=True):
    """How the job ended: *error* is None if it copied everything."""

    stopped: bool
    error: str | None


def commit_by_daemon(
    images: Sequence[ImageSpec],
    base_index: int,
    lock_fds: Sequence[int],
    on_progress: Callable[[CopyProgress], None],
    should_stop: Callable[[], bool],
    *,
    bandwidth: int | None = None,
) -> None:
    """Copy what the images above base define down into base.

    On return base's guest-visible content is that of top, base is closed and durable, and
    nothing else was written to. Base grows to top's virtual size and never shrinks. Enabled
    bitmaps of base would record the copy; disabled ones come through as they are.

    Args:
        images: the chain from its root to top. No one else may have any of them open.
        base_index: position of base in *images*; top is the last one and lies above it.
        lock_fds: descriptors of the locks on the images. The daemon inherits them, so the
            locks hold until it is gone, even if this process is killed.
        on_progress: called when there is progress, a few times a second.
        should_stop: asked as often; when it says yes, the copy is stopped and base closed.
        bandwidth: limit in bytes per second.

    Raises:
        Interrupted: *should_stop* said yes before everything was copied.
        CommitFailed: QEMU reported an error, or went away.
        DaemonMissing: qemu-storage-daemon is not installed; nothing was changed.
    """
    assert 0 <= base_index < len(images) - 1
    base, top = images[base_index].path, images[-1].path
    names = Names({}, ())
    try:
        with speakable_names(images) as names:
            chain = NodeChain(images, base_index, names)
            with StorageDaemon((*lock_fds, *names.descriptors)) as daemon:
                said_at_start = len(daemon.complaints)
                open_nodes(daemon, chain)
                _start_job(daemon, chain, bandwidth)
                outcome = _follow_job(daemon, on_progress, should_stop)
                _close(daemon, chain)
                complaints = _serious(daemon.complaints[said_at_start:])
    except (CommandRefused, ConnectionLost, DaemonFailed, OSError) as error:
        raise CommitFailed(base, top, names.in_message(str(error))) from error
    if outcome.stopped and outcome.error is not None:
        raise Interrupted(
            f"{base} holds a part of the copy, {top} is untouched and still gives the right content"
        )
    reasons = [text for text in (outcome.error, complaints) if text]
    if reasons:
        raise CommitFailed(base, top, names.in_message("; ".join(reasons)))


def _close(daemon: StorageDaemon, chain: NodeChain) -> None:
    # From top to root, as each node holds the one below it. Closed one by one, base has
    # written its bitmaps and its caches before the process is told to end.
    for index in reversed(range(len(chain.images))):
        daemon.execute("blockdev-del", {"node-name": node_name(index)})
    daemon.quit()


def _start_job(daemon: StorageDaemon, chain: NodeChain, bandwidth: int | None) -> None:
    assert chain.written is not None
    arguments: Options = {
        "job-id": JOB,
        "device": node_name(len(chain.images) - 1),
        "base-node": node_name(chain.written),
        "auto-dismiss": False,
        "filter-node-name": "commit-filter",
    }
    if bandwidth is not None:
        arguments["speed"] = bandwidth
    daemon.execute("block-commit", arguments)


def _follow_job(
    daemon: StorageDaemon,
    on_progress: Callable[[CopyProgress], None],
    should_stop: Callable[[], bool],
) -> _Outcome:
    """Watch the job until it is over, and let it complete once everything is copied."""
    reported = None
    stopped = completing = False
    while True:
        job = _query_job(daemon)
        progress = CopyProgress(job["current-progress"], job["total-progress"])
        if progress != reported:
            on_progress(progress)
            reported = progress
        if job["status"] == "concluded":
            break
        if job["status"] == "ready" and not completing:
            daemon.execute("job-complete", {"id": JOB})
            completing = True
        elif not (stopped or completing) and should_stop():
            stopped = True
            # It may have come to its own end since we asked for its status.
            with contextlib.suppress(CommandRefused):
                daemon.execute("job-cancel", {"id": JOB})
        # The events are only a reason to look again: each look asks the daemon itself, and
        # fails if the daemon is gone.
        daemon.wait_for_event(SECONDS_BETWEEN_REPORTS)
    daemon.execute("job-dismiss", {"id": JOB})
    return _Outcome(stopped, job.get("error"))


def _query_job(daemon: StorageDaemon) -> dict[str, Any]:
    (job,) = daemon.execute("query-jobs")
    return dict(job)


def _serious(complaints: str) -> str:
    """Of what the daemon said on standard error, the lines that are not mere warnings."""
    return "; ".join(
        line
        for line in complaints.replace(_REST_OF_A_WARNING, "\n").splitlines()
        if line.strip() and not any(mark in line for mark in _HARMLESS)
    )
