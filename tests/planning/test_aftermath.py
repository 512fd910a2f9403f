# SPDX-License-Identifier: Apache-2.0
"""What follows a merge: whose backing name changes, what is deleted or renamed, which snapshots go.

Facts are values here. That links and data files are found is tested with real ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pytest
from msgspec import Struct, field
from msgspec.structs import replace

from chainmerge.documents.plan import PlannedSnapshots, Repoint
from chainmerge.options import Direction, MergeOptions
from chainmerge.planning.aftermath import (
    changed_images,
    changed_snapshots,
    deleted_images,
    going,
    new_backing,
    planned_deletions,
    planned_rename,
    planned_repoints,
    planned_snapshots,
    removed_images,
    snapshots_to_remove,
)
from chainmerge.planning.facts import MergeFacts
from chainmerge.planning.removals import Belongings
from tests.support.merge_facts import (
    MIB,
    RAW,
    VM,
    header,
    merge_of,
    pull_of,
    qcow2,
    snapshots_in,
    with_base,
    with_relatives,
    with_removals,
    with_top,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chainmerge.chain.model import ImageInfo

PLAIN: Final = MergeOptions()
DELETE: Final = MergeOptions(delete=True)
KEEP_NAME: Final = MergeOptions(keep_name=True)
BOTH: Final = MergeOptions(delete=True, keep_name=True)
DROP: Final = MergeOptions(drop_snapshots=True)
DROP_AND_DELETE: Final = MergeOptions(drop_snapshots=True, delete=True)

MERGE: Final = merge_of()
RANGE: Final = merge_of(overlays=3, below=1)
PULL: Final = pull_of()
PULL_OF_RANGE: Final = pull_of(overlays=3, below=1)


def short(images: Iterable[ImageInfo]) -> str:
    """The images by name, without directory and ending."""
    return " ".join(image.path.stem for image in images)


class Row(Struct, frozen=True):
    """What becomes of the images: by name, in the order in which it happens."""

    situation: str
    facts: MergeFacts
    options: MergeOptions
    deleted: str = ""
    removed: str = ""  # deleted, or replaced by base
    renamed: bool = False  # base gets top's name
    changed: str = ""  # besides top: show other data, or are gone


IMAGES: Final = [
    Row("commit", MERGE, PLAIN, changed="base"),
    Row("commit and delete", MERGE, DELETE, deleted="top", removed="top", changed="base"),
    Row("commit under top's name", MERGE, KEEP_NAME, removed="top", renamed=True, changed="base"),
    Row(
        "commit under top's name and delete",
        MERGE,
        BOTH,
        removed="top",
        renamed=True,
        changed="base",
    ),
    Row("range", RANGE, PLAIN, changed="base mid1 mid2"),
    Row(
        "range and delete",
        RANGE,
        DELETE,
        deleted="top mid2 mid1",
        removed="top mid2 mid1",
        changed="base mid1 mid2",
    ),
    Row(
        "range under top's name",
        RANGE,
        KEEP_NAME,
        removed="top",
        renamed=True,
        changed="base mid1 mid2",
    ),
    Row(
        "range under top's name and delete",
        RANGE,
        BOTH,
        deleted="mid2 mid1",
        removed="mid2 mid1 top",
        renamed=True,
        changed="base mid1 mid2",
    ),
    Row("pull", PULL, PLAIN),
    Row("pull and delete", PULL, DELETE, deleted="base", removed="base", changed="base"),
    Row("pull has top's name anyway", PULL, KEEP_NAME),
    Row(
        "pull of a range and delete",
        PULL_OF_RANGE,
        BOTH,
        deleted="mid2 mid1 base",
        removed="mid2 mid1 base",
        changed="mid2 mid1 base",
    ),
]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.situation) for row in IMAGES])
def test_what_becomes_of_the_images(row: Row) -> None:
    rename = planned_rename(row.facts, row.options)
    assert row == replace(
        row,
        deleted=short(deleted_images(row.facts, row.options)),
        removed=short(removed_images(row.facts, row.options)),
        renamed=rename == (str(row.facts.base.path), str(row.facts.top.path)),
        changed=short(changed_images(row.facts, row.options)),
    )
    assert rename is None or row.renamed
    paths = [str(image.path) for image in deleted_images(row.facts, row.options)]
    assert list(planned_deletions(row.facts, row.options)) == paths


BASE_RAW: Final = VM / "base.raw"
TOP_RAW: Final = VM / "top.raw"
TOP_LINK: Final = VM / "current"
TOP_LINKS: Final = (TOP_LINK, VM / "latest")
BASE_LINK: Final = VM / "template"


def with_belongings(facts: MergeFacts, *, base: Belongings, top: Belongings) -> MergeFacts:
    return with_removals(facts, belongings={facts.base.identity: base, facts.top.identity: top})


OWNING: Final = with_belongings(
    MERGE,
    base=Belongings(data_file=BASE_RAW, links=(BASE_LINK,)),
    top=Belongings(data_file=TOP_RAW, links=TOP_LINKS),
)
LINKED: Final = with_belongings(
    with_top(MERGE, path=TOP_LINK), base=Belongings(), top=Belongings(links=TOP_LINKS)
)
TOP_FILE: Final = MERGE.top.path
ALIAS: Final = VM.parent / "alias" / "top.qcow2"


@pytest.mark.parametrize(
    ("facts", "options", "data_files", "links", "deleted"),
    [
        pytest.param(OWNING, PLAIN, [], [], [], id="nothing is asked for"),
        pytest.param(
            OWNING,
            DELETE,
            [TOP_RAW],
            TOP_LINKS,
            [TOP_FILE, TOP_RAW, *TOP_LINKS],
            id="with an image its data file and its links go",
        ),
        pytest.param(
            OWNING,
            KEEP_NAME,
            [],
            [BASE_LINK],
            [BASE_LINK],
            id="the data of what is replaced stays, links to base's old name go",
        ),
        pytest.param(
            OWNING,
            BOTH,
            [TOP_RAW],
            [BASE_LINK],
            [TOP_RAW, BASE_LINK],
            id="the data of what is replaced goes if deleting is asked for",
        ),
        pytest.param(
            replace(OWNING, direction=Direction.PULL),
            BOTH,
            [BASE_RAW],
            [BASE_LINK],
            [MERGE.base.path, BASE_RAW, BASE_LINK],
            id="by a pull that of base goes",
        ),
        pytest.param(
            LINKED,
            DELETE,
            [],
            TOP_LINKS,
            [TOP_FILE, *TOP_LINKS],
            id="the file is deleted, not only the link to it",
        ),
        pytest.param(
            with_belongings(with_top(MERGE, path=ALIAS), base=Belongings(), top=Belongings()),
            DELETE,
            [],
            [],
            [ALIAS],
            id="it is deleted by the name it has in a directory that is a link",
        ),
        pytest.param(
            with_belongings(
                MERGE, base=Belongings(), top=Belongings(kept_data_file="top.raw stays")
            ),
            DELETE,
            [],
            [],
            [TOP_FILE],
            id="a data file that others need stays",
        ),
    ],
)
def test_what_goes_with_an_image(
    facts: MergeFacts, options: MergeOptions, data_files: Any, links: Any, deleted: Any
) -> None:
    found = going(facts, options)
    assert found.data_files == tuple(data_files)
    assert found.links == tuple(links)
    assert planned_deletions(facts, options) == tuple(map(str, deleted))


CHILD: Final = qcow2(VM / "child.qcow2", MERGE.top.path)
ABSOLUTE: Final = replace(CHILD, backing_name=str(MERGE.top.path))
BELOW: Final = replace(CHILD, path=VM / "clones" / "child.qcow2", backing_name="../top.qcow2")
RAW_SAID: Final = replace(CHILD, header=header(backing_format="raw"))


def among(facts: MergeFacts, *children: ImageInfo) -> MergeFacts:
    return with_relatives(facts, children=children)


@pytest.mark.parametrize(
    ("facts", "options", "repoints"),
    [
        pytest.param(MERGE, PLAIN, [], id="no child, and top stands on base already"),
        pytest.param(
            among(MERGE, CHILD),
            PLAIN,
            [("child", "top.qcow2", "base.qcow2", "qcow2")],
            id="a child",
        ),
        pytest.param(
            among(MERGE, ABSOLUTE),
            DELETE,
            [("child", str(VM / "top.qcow2"), str(VM / "base.qcow2"), "qcow2")],
            id="a child that names it from the root",
        ),
        pytest.param(
            among(MERGE, BELOW, CHILD),
            PLAIN,
            [
                ("clones/child", "../top.qcow2", "../base.qcow2", "qcow2"),
                ("child", "top.qcow2", "base.qcow2", "qcow2"),
            ],
            id="a child in another directory, and one more",
        ),
        pytest.param(
            among(with_base(MERGE, **RAW), CHILD),
            PLAIN,
            [("child", "top.qcow2", "base.qcow2", "raw")],
            id="base has another format",
        ),
        pytest.param(
            RANGE, PLAIN, [("top", "mid2.qcow2", "base.qcow2", "qcow2")], id="top of a range"
        ),
        pytest.param(
            among(RANGE, CHILD),
            PLAIN,
            [
                ("child", "top.qcow2", "base.qcow2", "qcow2"),
                ("top", "mid2.qcow2", "base.qcow2", "qcow2"),
            ],
            id="top of a range comes after its child",
        ),
        pytest.param(RANGE, DELETE, [], id="top of a range goes"),
        pytest.param(RANGE, KEEP_NAME, [], id="top of a range is replaced"),
        pytest.param(among(MERGE, CHILD), KEEP_NAME, [], id="base has the name that it knows"),
        pytest.param(
            among(with_base(MERGE, **RAW), CHILD),
            KEEP_NAME,
            [("child", "top.qcow2", "top.qcow2", "raw")],
            id="base has the name, and another format",
        ),
        pytest.param(
            among(with_base(MERGE, **RAW), RAW_SAID),
            KEEP_NAME,
            [],
            id="base has the name, and the format that it knows",
        ),
        pytest.param(among(PULL_OF_RANGE, CHILD), DELETE, [], id="a pull leaves top where it is"),
    ],
)
def test_whose_backing_name_changes(
    facts: MergeFacts, options: MergeOptions, repoints: list[tuple[str, str, str, str]]
) -> None:
    assert planned_repoints(facts, options) == tuple(
        Repoint(str(VM / f"{child}.qcow2"), *names) for child, *names in repoints
    )


@pytest.mark.parametrize(
    ("facts", "backing"),
    [
        pytest.param(PULL, None, id="base was the root"),
        pytest.param(PULL_OF_RANGE, ("root0.qcow2", "qcow2"), id="base stood on another image"),
        pytest.param(pull_of(below=2), ("root1.qcow2", "qcow2"), id="the one right below base"),
    ],
)
def test_what_top_stands_on_after_a_pull(
    facts: MergeFacts, backing: tuple[str, str] | None
) -> None:
    assert new_backing(facts) == backing


def test_the_new_backing_file_is_named_as_the_old_one_was() -> None:
    facts = with_top(PULL_OF_RANGE, backing_name=str(VM / "mid2.qcow2"))
    assert new_backing(facts) == (str(VM / "root0.qcow2"), "qcow2")


NAMES: Final = ("a", "b", "c")
SECOND: Final = frozenset({1})


class Snapshots(Struct, frozen=True):
    """What becomes of three snapshots ``a b c``, the second of which the merge would change."""

    situation: str
    facts: MergeFacts
    options: MergeOptions = PLAIN
    index: int = -1
    kept: str = "a c"
    lost: str = "b"
    dropped: str = ""
    freed: int = field(default=MIB)


SNAPSHOTS: Final = [
    Snapshots("of top", MERGE),
    Snapshots("of top, to be deleted", MERGE, DROP, lost="", dropped="b"),
    Snapshots("of top, which is deleted", MERGE, DELETE, kept="", lost="a b c", freed=0),
    Snapshots(
        "of top, which may be deleted with them",
        MERGE,
        DROP_AND_DELETE,
        kept="",
        lost="",
        dropped="a b c",
        freed=0,
    ),
    Snapshots("of top, which is replaced", MERGE, KEEP_NAME, kept="", lost="a b c", freed=0),
    Snapshots("of base, deleting top", MERGE, DELETE, index=0),
    Snapshots("of base, which gets top's name", MERGE, KEEP_NAME, index=0),
    Snapshots("of one between", RANGE, index=2),
    Snapshots("of one between, which is deleted", RANGE, DELETE, 2, kept="", lost="a b c", freed=0),
    Snapshots("of one between, not deleted", RANGE, KEEP_NAME, 2),
    Snapshots("base has all already", replace(MERGE, merged=True), kept="a b c", lost="", freed=0),
    Snapshots(
        "base shows all already",
        replace(MERGE, content_merged=True),
        DROP,
        kept="a b c",
        lost="",
        freed=0,
    ),
    Snapshots("top of a range is put on base", replace(RANGE, merged=True)),
    Snapshots(
        "one between is not", replace(RANGE, merged=True), index=2, kept="a b c", lost="", freed=0
    ),
    Snapshots("a pull puts top elsewhere", replace(PULL, merged=True)),
    Snapshots("a pull deletes base", PULL, DELETE, 0, kept="", lost="a b c", freed=0),
]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.situation) for row in SNAPSHOTS])
def test_what_becomes_of_snapshots(row: Snapshots) -> None:
    image = row.facts.chain.images[row.index]
    views = snapshots_in(image, *NAMES, changed=SECOND)
    facts = replace(row.facts, snapshots=(views,))
    assert planned_snapshots(views, facts, row.options) == PlannedSnapshots(
        image=str(image.path),
        kept=tuple(row.kept.split()),
        lost=tuple(row.lost.split()),
        dropped=tuple(row.dropped.split()),
        freed=row.freed,
    )
    # Before the merge those go that would show other data; those of deleted images go later.
    changed = changed_snapshots(views, facts)
    removal = ((image, changed),) if changed and row.options.drop_snapshots else ()
    assert snapshots_to_remove(facts, row.options) == removal
