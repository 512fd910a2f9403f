# SPDX-License-Identifier: Apache-2.0
"""The QEMU engine: guest data is copied into base by ``qemu-storage-daemon``.

One process does the whole copy with one active ``block-commit`` job. Every node of the
chain is given explicitly, so nothing that a header says makes QEMU open another file.
Only base is open for writing: QEMU marks every persistent bitmap of an image that it has
open for writing as in-use, and a kill leaves them so. (Checked with QEMU 7.2 and 10.0:
with top and the images between opened read-only, not a byte of them changes.)

The daemon exits with 0 even when it has lost bitmaps while closing. So an outcome counts
as good only if the job ended without an error, every node closed, the process exited
with 0, and it had nothing to say on standard error.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from chainmerge.engines.errors import CommandRefused, CommitFailed, ConnectionLost, DaemonFailed
from chainmerge.engines.qmp import StorageDaemon
from chainmerge.errors import Interrupted
from chainmerge.qcow2.header import parse_header
from chainmerge.space import may_detect_zeroes
from chainmerge.storage.files import FileReadable

JOB = "commit"
SECONDS_BETWEEN_REPORTS = 0.25
DIRECT_IO_BLOCK = 4096

# The formats whose nodes have a backing file that must be given, be it as "none".
_COW_FORMATS = frozenset({"qcow2", "qcow", "qed", "vmdk"})

# What QEMU puts between the program's name and a message that is no error.
_HARMLESS = (": warning: ", ": info: ")

# What QEMU adds to the warning about bitmaps that a program without support for them has left
# behind. It has neither a name in front nor a newline at its end.
_REST_OF_A_WARNING = (
    "Some clusters may be leaked, run 'qemu-img check -r' on the image file to fix."
)

Options: TypeAlias = dict[str, object]


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """One image of the chain as QEMU is to open it.

    Attributes:
        path: Path of the file or block device.
        format: QEMU's name of the format: ``qcow2``, ``raw``, ``luks``, ``vmdk``, ...
        is_block_device: Whether *path* is a block device.
        data_file: Path of the external data file of a qcow2 image that has one.
        key_file: Path of a file that holds the passphrase of an encrypted image.
        limit: Bytes of its file that the image may use; the file must be at least so large.
            Writing beyond them fails as on a full volume. None for no limit.
    """

    path: str
    format: str
    is_block_device: bool = False
    data_file: str | None = None
    key_file: str | None = None
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class CopyProgress:
    """How much of the guest data has been copied, in bytes.

    *total* can change: QEMU finds out what is to be copied while it goes.
    """

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class _Names:
    """What the daemon is told for each path, and the descriptors that it needs for that."""

    by_path: Mapping[str, str]
    descriptors: tuple[int, ...]

    def of(self, path: str) -> str:
        return self.by_path[path]

    def in_message(self, message: str) -> str:
        """*message* with the names that the user knows."""
        longest_first = sorted(self.by_path.items(), key=lambda item: -len(item[1]))
        for path, name in longest_first:
            message = message.replace(name, path)
        return message


@dataclass(frozen=True, slots=True)
class _Chain:
    """The images from root to top, which of them is base, and what the daemon calls them."""

    images: Sequence[ImageSpec]
    base_index: int
    names: _Names


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How the job ended: *error* is None if it copied everything."""

    stopped: bool
    error: str | None


def commit(
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
    names = _Names({}, ())
    try:
        with _speakable_names(images) as names:
            chain = _Chain(images, base_index, names)
            with StorageDaemon((*lock_fds, *names.descriptors)) as daemon:
                said_at_start = len(daemon.complaints)
                _open(daemon, chain)
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


def _open(daemon: StorageDaemon, chain: _Chain) -> None:
    for index, image in enumerate(chain.images):
        try:
            if image.key_file is not None:
                daemon.execute("object-add", _secret(index, chain.names.of(image.key_file)))
            daemon.execute("blockdev-add", _node(chain, index))
        except CommandRefused as refused:
            # QEMU's own reason does not always say which image it means.
            reason = f"{image.path}: {refused.reason}"
            raise CommandRefused(refused.command, reason) from refused


def _close(daemon: StorageDaemon, chain: _Chain) -> None:
    # From top to root, as each node holds the one below it. Closed one by one, base has
    # written its bitmaps and its caches before the process is told to end.
    for index in reversed(range(len(chain.images))):
        daemon.execute("blockdev-del", {"node-name": _node_name(index)})
    daemon.quit()


def _start_job(daemon: StorageDaemon, chain: _Chain, bandwidth: int | None) -> None:
    arguments: Options = {
        "job-id": JOB,
        "device": _node_name(len(chain.images) - 1),
        "base-node": _node_name(chain.base_index),
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


def _node_name(index: int) -> str:
    return f"image{index}"


def _secret(index: int, file_name: str) -> Options:
    return {"qom-type": "secret", "id": f"key{index}", "file": file_name}


def _node(chain: _Chain, index: int) -> Options:
    """The arguments of ``blockdev-add`` for one image, with all its nodes."""
    image = chain.images[index]
    writable = index == chain.base_index
    node: Options = {
        "driver": image.format,
        "node-name": _node_name(index),
        "read-only": not writable,
        "file": _limited(image, _protocol(chain, index, image.path)),
    }
    if writable:
        node["discard"] = "unmap"
        if _may_detect_zeroes(image):
            # The job copies zeros as data where the images above tell of them in pieces that
            # are too small for it. Like this they become zero clusters after all; the bound
            # of chainmerge.space relies on it.
            node["detect-zeroes"] = "unmap"
        if image.format == "qcow2":
            # With them QEMU sets the dirty bit, and a kill would leave an image that has to be
            # repaired before anything else can be done with it.
            node["lazy-refcounts"] = False
    if image.format in _COW_FORMATS:
        node["backing"] = _node_name(index - 1) if index > 0 else None
    if image.data_file is not None:
        node["data-file"] = _protocol(chain, index, image.data_file)
    if image.key_file is not None:
        node |= _decryption(image.format, f"key{index}")
    return node


def _protocol(chain: _Chain, index: int, path: str) -> Options:
    image = chain.images[index]
    writable = index == chain.base_index
    is_block_device = image.is_block_device and path == image.path
    # A file of raw data is as long as the disk, to the byte.
    padding_harms = writable and (image.format == "raw" or path == image.data_file)
    direct = _takes_direct_io(path) and not (padding_harms and _ends_within_a_block(chain))
    return {
        "driver": "host_device" if is_block_device else "file",
        "filename": chain.names.of(path),
        "read-only": not writable,
        # The caller holds the locks, the same that QEMU would take.
        "locking": "off",
        "aio": "threads",
        "discard": "unmap",
        "cache": {"direct": direct},
    }


def _ends_within_a_block(chain: _Chain) -> bool:
    """Whether base's disk ends, now or after the merge, where no block of a file system does.

    With direct I/O QEMU refuses to write to such a file, or makes it longer.
    """
    return any(
        _disk_size(chain.images[index]) % DIRECT_IO_BLOCK for index in (chain.base_index, -1)
    )


def _disk_size(image: ImageSpec) -> int:
    with FileReadable(image.path) as readable:
        return parse_header(readable).virtual_size if image.format == "qcow2" else readable.size


def _limited(image: ImageSpec, protocol: Options) -> Options:
    if image.limit is None:
        return protocol
    return {"driver": "raw", "size": image.limit, "discard": "unmap", "file": protocol}


def _decryption(image_format: str, secret: str) -> Options:
    if image_format == "luks":
        return {"key-secret": secret}
    return {"encrypt": {"format": "luks", "key-secret": secret}}


def _may_detect_zeroes(image: ImageSpec) -> bool:
    """Whether zeros among the data may be written as zeros without destroying base.

    QEMU's qcow2 driver does not order writing zeros to one part of a cluster after a write to
    another part of it that is under way. The job never has two such writes under way if a
    cluster is no larger than what it copies at least.
    """
    if image.format == "raw":
        return True
    if image.format != "qcow2":
        return False
    with FileReadable(image.path) as readable:
        return may_detect_zeroes(parse_header(readable).cluster_size)


def _takes_direct_io(path: str) -> bool:
    """Whether the file system lets *path* be opened with O_DIRECT."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _speakable_names(images: Sequence[ImageSpec]) -> Iterator[_Names]:
    """Find a name in Unicode for every file.

    File names are bytes, JSON is Unicode. A file whose name is not valid UTF-8 is opened
    here, and the daemon reaches it through the descriptor that it inherits.
    """
    optional = [path for image in images for path in (image.data_file, image.key_file)]
    paths = [image.path for image in images] + [path for path in optional if path is not None]
    by_path: dict[str, str] = {}
    descriptors: list[int] = []
    with contextlib.ExitStack() as opened:
        for path in paths:
            absolute = os.path.abspath(path)  # noqa: PTH100 (must not resolve symbolic links)
            if not _is_utf8(absolute):
                descriptors.append(os.open(absolute, os.O_PATH | os.O_CLOEXEC))
                opened.callback(os.close, descriptors[-1])
                absolute = f"/proc/self/fd/{descriptors[-1]}"
            by_path[path] = absolute
        yield _Names(by_path, tuple(descriptors))


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
