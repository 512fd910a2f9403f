# SPDX-License-Identifier: Apache-2.0
"""The end of a merge: files that go or are renamed, and records of that."""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from chainmerge.documents.plan import EngineName
from chainmerge.options import Direction
from chainmerge.planning.removals import Belongings
from chainmerge.storage.lvm_volumes import KnownVolume
from tests.planning.situations.rows import (
    AWAY,
    CHILD,
    CHILD_OF_MIDDLE,
    DELETE,
    ELSEWHERE,
    IMMUTABLE,
    KEEP_NAME,
    MERGE,
    NO_WRITES,
    PULL,
    RANGE,
    TAKEN_OVER,
    Row,
    sibling,
)
from tests.support.merge_facts import (
    DEVICE,
    RAW,
    VM,
    decided,
    header,
    with_base,
    with_decisions,
    with_relatives,
    with_removals,
    with_searched,
    with_top,
)

BASE_AWAY: Final = with_searched(with_base(MERGE, **AWAY), sole_user=True)
ON_VOLUMES: Final = with_base(with_top(MERGE, **DEVICE), **DEVICE)
TOP_ID, BASE_ID = ON_VOLUMES.top.identity, ON_VOLUMES.base.identity


def volume(group: str, attributes: str = "-wi-a-----") -> KnownVolume:
    return KnownVolume(group, "name", "uuid", attributes)


SETTLING: Final = [
    Row(
        "top is a device",
        with_top(MERGE, **DEVICE),
        ("volume-not-a-file",),
        options=DELETE,
    ),
    Row(
        "base and top are, and base is to be renamed",
        with_base(with_top(MERGE, **DEVICE), **DEVICE),
        ("volume-not-a-file", "volume-not-a-file"),
        options=KEEP_NAME,
    ),
    Row(
        "both are logical volumes, of one group",
        with_removals(ON_VOLUMES, volumes={TOP_ID: volume("vg"), BASE_ID: volume("vg")}),
        options=KEEP_NAME,
        spares="rename-across-groups",
    ),
    Row(
        "of two groups",
        with_removals(ON_VOLUMES, volumes={TOP_ID: volume("vg"), BASE_ID: volume("other")}),
        ("rename-across-groups",),
        options=KEEP_NAME,
    ),
    Row(
        "a file is to get the name of a volume",
        with_removals(with_top(MERGE, **DEVICE), volumes={TOP_ID: volume("vg")}),
        ("rename-across-groups",),
        options=KEEP_NAME,
    ),
    Row(
        "a logical volume is removed",
        with_removals(with_top(MERGE, **DEVICE), volumes={TOP_ID: volume("vg")}),
        options=DELETE,
        spares="volume-not-a-file",
    ),
    Row(
        "one with LVM snapshots is not",
        with_removals(with_top(MERGE, **DEVICE), volumes={TOP_ID: volume("vg", "owi-aos---")}),
        ("cannot-take-away",),
        options=DELETE,
    ),
    Row("it stays", with_top(MERGE, **DEVICE), spares="volume-not-a-file"),
    Row(
        "base is, which a commit does not delete",
        with_base(MERGE, **DEVICE),
        options=DELETE,
        spares="volume-not-a-file",
    ),
    Row(
        "a pull has top's name without being told",
        with_top(PULL, **DEVICE),
        options=KEEP_NAME,
        spares="volume-not-a-file",
    ),
    Row(
        "base lies on another file system",
        with_base(MERGE, identity=(77, 1)),
        ("rename-across-file-systems",),
        options=KEEP_NAME,
    ),
    Row(
        "base is reached by another mount of the same",
        with_removals(BASE_AWAY, mounts={VM: 1, ELSEWHERE: 2}),
        ("rename-across-file-systems",),
        options=KEEP_NAME,
    ),
    Row(
        "it is in another directory of the same mount",
        with_removals(BASE_AWAY, mounts={VM: 1, ELSEWHERE: 1}),
        options=KEEP_NAME,
        spares="rename-across-file-systems",
    ),
    Row(
        "it keeps its own name",
        with_base(MERGE, identity=(77, 1)),
        options=DELETE,
        spares="rename-across-file-systems",
    ),
    Row(
        "others have base's name",
        replace(sibling(), merged=True),
        ("base-named-by-others",),
        options=KEEP_NAME,
    ),
    Row(
        "and base has its name still",
        replace(sibling(), merged=True),
        options=DELETE,
        spares="base-named-by-others",
    ),
    Row(
        "base's data file is where its directory says",
        with_base(
            BASE_AWAY,
            data_file=ELSEWHERE / "base.raw",
            header=header(data_file_name="base.raw"),
        ),
        ("data-file-out-of-reach",),
        options=KEEP_NAME,
    ),
    Row(
        "base does not name it at all",
        with_base(BASE_AWAY, data_file=ELSEWHERE / "base.raw"),
        ("data-file-out-of-reach",),
        options=KEEP_NAME,
    ),
    Row(
        "base is raw, and can have none",
        with_decisions(with_base(BASE_AWAY, **RAW)),
        options=KEEP_NAME,
        spares="data-file-out-of-reach",
    ),
    Row(
        "base names it from the root",
        with_base(
            BASE_AWAY,
            data_file=ELSEWHERE / "base.raw",
            header=header(data_file_name="/templates/base.raw"),
        ),
        options=KEEP_NAME,
        spares="data-file-out-of-reach",
    ),
    Row(
        "top is in the same directory",
        with_base(MERGE, data_file=VM / "base.raw", header=header(data_file_name="base.raw")),
        options=KEEP_NAME,
        spares="data-file-out-of-reach",
    ),
    Row(
        "top cannot be deleted",
        with_removals(MERGE, obstacles={MERGE.top.path: IMMUTABLE}),
        ("cannot-take-away",),
        options=DELETE,
    ),
    Row(
        "base cannot be renamed, nor top replaced",
        with_removals(MERGE, obstacles={MERGE.top.path: IMMUTABLE, MERGE.base.path: IMMUTABLE}),
        ("cannot-take-away", "cannot-take-away"),
        options=KEEP_NAME,
    ),
    Row(
        "top's data file cannot be deleted",
        with_removals(
            MERGE,
            belongings={MERGE.top.identity: Belongings(data_file=VM / "top.raw")},
            obstacles={VM / "top.raw": IMMUTABLE},
        ),
        ("cannot-take-away",),
        options=DELETE,
    ),
    Row(
        "the link to top cannot be deleted",
        with_removals(
            MERGE,
            belongings={MERGE.top.identity: Belongings(links=(VM / "current",))},
            obstacles={VM / "current": IMMUTABLE},
        ),
        ("cannot-take-away",),
        options=DELETE,
    ),
    Row(
        "base cannot be, which is not asked for",
        with_removals(MERGE, obstacles={MERGE.base.path: IMMUTABLE}),
        options=DELETE,
        spares="cannot-take-away",
    ),
    Row(
        "the data file of what base takes the place of stays",
        with_removals(
            MERGE,
            belongings={MERGE.top.identity: Belongings(data_file=VM / "top.raw")},
            obstacles={VM / "top.raw": IMMUTABLE},
        ),
        options=KEEP_NAME,
        spares="cannot-take-away",
    ),
    Row(
        "a pull would delete what others stand on",
        replace(sibling(), direction=Direction.PULL),
        ("doomed-in-use",),
        options=DELETE,
    ),
    Row(
        "an image between is what they stand on",
        replace(CHILD_OF_MIDDLE, direction=Direction.PULL),
        ("doomed-in-use",),
        options=DELETE,
    ),
    Row(
        "it deletes nothing",
        replace(sibling(), direction=Direction.PULL),
        options=KEEP_NAME,
        spares="doomed-in-use",
    ),
    Row(
        "nobody else stands on it",
        with_relatives(PULL, children=(CHILD,)),
        options=DELETE,
        spares="doomed-in-use",
    ),
]

CLOSED: Final = with_removals(MERGE, closed={VM: NO_WRITES})
BY_QEMU: Final = replace(CLOSED, engine=EngineName.QEMU)
RECORDS: Final = [
    Row("no journal can be kept beside base", CLOSED, ("state-directory-unusable",)),
    Row(
        "a journal is kept though there is no bitmap to be saved",
        with_decisions(CLOSED),
        ("state-directory-unusable",),
    ),
    Row(
        "what is to be renamed cannot be written down",
        with_decisions(BY_QEMU, TAKEN_OVER),
        ("state-directory-unusable",),
        options=KEEP_NAME,
    ),
    Row(
        "base's bitmap is not to be kept, and need not be saved",
        with_decisions(BY_QEMU, decided("valid", "absent")),
        spares="state-directory-unusable",
    ),
    Row(
        "base's directory is of no use for a pull",
        with_removals(replace(BASE_AWAY, direction=Direction.PULL), closed={ELSEWHERE: NO_WRITES}),
        spares="state-directory-unusable",
    ),
    Row(
        "base's bitmap cannot be saved while QEMU copies",
        BY_QEMU,
        ("state-directory-unusable",),
    ),
    Row(
        "those of a range would have to be, too",
        with_decisions(
            with_removals(replace(RANGE, engine=EngineName.QEMU), closed={VM: NO_WRITES}),
            decided("absent", "valid", "valid", "valid"),
        ),
        ("state-directory-unusable",),
    ),
    Row(
        "QEMU copies, and base has no bitmap to be saved",
        with_decisions(BY_QEMU, TAKEN_OVER),
        spares="state-directory-unusable",
    ),
    Row(
        "what has to be deleted cannot be written down",
        with_decisions(BY_QEMU, TAKEN_OVER),
        ("state-directory-unusable",),
        options=DELETE,
    ),
    Row(
        "it is a pull that cannot be written down",
        replace(CLOSED, direction=Direction.PULL),
        ("state-directory-unusable",),
    ),
    Row(
        "both directories take no files",
        with_removals(BASE_AWAY, closed={VM: NO_WRITES, ELSEWHERE: NO_WRITES}),
        ("state-directory-unusable", "state-directory-unusable"),
        options=DELETE,
    ),
    Row(
        "top's directory is of no use for a commit that leaves top alone",
        with_removals(BASE_AWAY, closed={VM: NO_WRITES}),
        spares="state-directory-unusable",
    ),
    Row("all is merged", replace(CLOSED, merged=True), spares="state-directory-unusable"),
    Row(
        "records of devices are elsewhere",
        with_base(CLOSED, **DEVICE),
        spares="state-directory-unusable",
    ),
]
