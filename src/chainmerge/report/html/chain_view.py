# SPDX-License-Identifier: Apache-2.0
"""What the part of a page about one chain shows: text and drawings, from its pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from markupsafe import Markup
from msgspec import Struct

from chainmerge.arithmetic.counting import counted
from chainmerge.documents.plan import MergePlan, Progress, Role
from chainmerge.report.html.drawings import (
    Part,
    TreeStep,
    bar,
    map_of_disk,
    sample,
    states_of_checkpoint,
    tree_step,
)
from chainmerge.report.names import ImageNames, names_in
from chainmerge.report.plan_tables import all_warnings
from chainmerge.report.text import short_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from chainmerge.documents.chain_pictures import (
        ChainPictures,
        LayerSpace,
        PicturedCheckpoint,
    )
    from chainmerge.documents.disk_map import DiskMap

_SPACE: Final = (
    ("visible", "data that the guest sees"),
    ("hidden", "data that images above hide"),
    ("metadata", "tables and refcounts"),
    ("bitmaps", "bitmaps"),
)
_ROLE_LOOKS: Final[Mapping[Role, str]] = {
    Role.BELOW: "of-below",
    Role.BASE: "of-base",
    Role.MIDDLE: "of-merged",
    Role.TOP: "of-merged",
    Role.ABOVE: "of-above",
}
_LOOKS_IN_WORDS: Final = (
    ("of-above", "above the merge"),
    ("of-merged", "merged"),
    ("of-base", "base"),
    ("of-below", "below the merge"),
)
_STATES: Final = (
    ("good", "valid"),
    ("caution", "disabled (low box) or tombstone (line)"),
    ("broken", "in-use: worthless"),
)
_MARKS_OF_AXIS: Final = 4


class Sample(Struct, frozen=True):
    """An entry of a legend."""

    drawing: Markup
    label: str


class ImageRow(Struct, frozen=True):
    """An image of the chain."""

    step: Markup
    name: str
    about: str
    doing: str
    bar: Markup
    sizes: tuple[tuple[str, str], ...]
    """What it is, and how much of that."""


class CheckpointRow(Struct, frozen=True):
    """A checkpoint, over all images of the chain."""

    name: str
    verdict: str
    look: str
    reason: str
    next_backup: str
    states: Markup


class ChainView(Struct, frozen=True):
    """The part of a page about one chain.

    Attributes:
        heading: What it is called.
        place: The directory of its images, empty if their names say it.
        summary: What there is, in a sentence.
        said: Lines of text as a terminal shows them.
        images: From the leaf down.
        space: The legend of their bars.
        map: The map of the disk; None if it has no bytes.
        map_ends: The names of the uppermost and of the lowest layer.
        map_legend: What the looks of the layers mean.
        axis: Places on the disk, from its start to its end.
        checkpoints: By name.
        states: The legend of their boxes.
        more_checkpoints: Said of those that are left out, empty if none are.
        warnings: Sentences.
    """

    heading: str
    place: str
    summary: str
    said: tuple[str, ...]
    images: tuple[ImageRow, ...]
    space: tuple[Sample, ...]
    map: Markup | None
    map_ends: tuple[str, str]
    map_legend: tuple[Sample, ...]
    axis: tuple[str, ...]
    checkpoints: tuple[CheckpointRow, ...]
    states: tuple[Sample, ...]
    more_checkpoints: str
    warnings: tuple[str, ...]


def chain_view(pictures: ChainPictures, heading: str, said: Sequence[str] = ()) -> ChainView:
    """What to show of a chain.

    Args:
        pictures: of the chain.
        heading: what to put above it; empty for the name of its uppermost image.
        said: lines of text that come first.
    """
    names = names_in([layer.path for layer in pictures.layers])
    plan = pictures.plan
    looks = _looks(pictures)
    leaf, root = pictures.layers[-1], pictures.layers[0]
    return ChainView(
        heading=heading or names.of(pictures.image),
        place=names.directory.rstrip("/"),
        summary=_summary(pictures),
        said=tuple(said),
        images=tuple(_image_rows(pictures, names)),
        space=tuple(Sample(sample(look), label) for look, label in _SPACE),
        map=_map(pictures.map, looks) if pictures.map.columns else None,
        map_ends=(names.of(leaf.path), names.of(root.path)),
        map_legend=tuple(
            Sample(sample(look), label) for look, label in _LOOKS_IN_WORDS if look in looks
        ),
        axis=_axis(pictures.map),
        checkpoints=tuple(_checkpoint(one, len(pictures.layers)) for one in pictures.checkpoints),
        states=tuple(Sample(sample(look), label) for look, label in _STATES),
        more_checkpoints=(
            f"{counted(pictures.checkpoints_left_out, 'more checkpoint')} not shown"
            if pictures.checkpoints_left_out
            else ""
        ),
        warnings=(
            *((pictures.problem,) if pictures.problem else ()),
            *(all_warnings(plan, names) if plan else ()),
        ),
    )


def _summary(pictures: ChainPictures) -> str:
    layers = pictures.layers
    visible = sum(layer.visible_bytes for layer in layers)
    hidden = sum(layer.hidden_bytes for layer in layers)
    return (
        f"{counted(len(layers), 'image')}, a disk of {short_size(pictures.map.virtual_size)}: "
        f"{short_size(visible)} of data that the guest sees, {short_size(hidden)} hidden"
    )


def _looks(pictures: ChainPictures) -> tuple[str, ...]:
    """The class of each layer in the map, from the root up."""
    roles = _roles(pictures.plan)
    return tuple(
        _ROLE_LOOKS[roles[layer.path]] if layer.path in roles else "visible"
        for layer in pictures.layers
    )


def _roles(plan: MergePlan | None) -> Mapping[str, Role]:
    if plan is None or plan.progress is Progress.MERGED:
        return {}
    return {image.path: image.role for image in plan.images}


def _image_rows(pictures: ChainPictures, names: ImageNames) -> Iterator[ImageRow]:
    leaf_first = tuple(reversed(pictures.layers))
    largest = max(map(_held, leaf_first))
    roles = _roles(pictures.plan)
    in_merge = [roles.get(layer.path) in _MERGED for layer in leaf_first]
    for index, layer in enumerate(leaf_first):
        role = roles.get(layer.path)
        step = TreeStep(
            stands_alone_above=index == 0,
            stands_alone_below=index == len(leaf_first) - 1,
            mark=_mark(layer.path, role, pictures.plan),
            moves_above=in_merge[index] and index > 0 and in_merge[index - 1],
            moves_below=in_merge[index] and any(in_merge[index + 1 : index + 2]),
        )
        yield ImageRow(
            step=tree_step(step),
            name=names.of(layer.path),
            about=_about(layer, index, len(leaf_first), role),
            doing=_doing(layer.path, role, pictures.plan, names),
            bar=_space_bar(layer, largest),
            sizes=tuple(
                (look, short_size(value))
                for (look, _), value in zip(_SPACE, _space(layer), strict=True)
            ),
        )


_MERGED: Final = frozenset({Role.BASE, Role.MIDDLE, Role.TOP})


def _about(layer: LayerSpace, index: int, count: int, role: Role | None) -> str:
    parts = [layer.format]
    if index == 0:
        parts.append("uppermost")
    if index == count - 1:
        parts.append("root")
    if role is not None:
        parts.append(str(role))
    if layer.occupied_bytes is not None:
        parts.append(f"takes {short_size(layer.occupied_bytes)}")
    return ", ".join(parts)


def _mark(path: str, role: Role | None, plan: MergePlan | None) -> str:
    if plan is None or role not in _MERGED:
        return "stays"
    if path == plan.result:
        return "result"
    return "goes" if path in plan.delete or not plan.pulls else "stays"


def _doing(path: str, role: Role | None, plan: MergePlan | None, names: ImageNames) -> str:
    """What a merge would do with an image, in words."""
    if plan is None or role is None:
        return ""
    result = names.of(plan.result)
    if path == plan.result:
        renamed = f", renamed to {names.of(plan.rename[1])}" if plan.rename else ""
        return f"gets all of it{renamed}"
    if role in _MERGED:
        rest = "deleted" if path in plan.delete else "stays as it is"
        if not plan.pulls and path not in plan.delete:
            rest = "must not be used any more"
        return f"goes into {result}; {rest}"
    if any(one.child == path for one in plan.repoint):
        return f"gets {result} as its backing file"
    return ""


def _space(layer: LayerSpace) -> tuple[int, int, int, int]:
    return layer.visible_bytes, layer.hidden_bytes, layer.metadata_bytes, layer.bitmap_bytes


def _held(layer: LayerSpace) -> int:
    return sum(_space(layer))


def _space_bar(layer: LayerSpace, largest: int) -> Markup:
    parts = [Part(look, value) for (look, _), value in zip(_SPACE, _space(layer), strict=True)]
    said = ", ".join(f"{part.look} {short_size(part.value)}" for part in parts)
    return bar(parts, largest, said)


def _map(drawn: DiskMap, looks: Sequence[str]) -> Markup:
    written = sum(column.data_bytes for column in drawn.columns)
    said = (
        f"{short_size(written)} of {short_size(drawn.virtual_size)} are data; a column stands for "
        f"{short_size(drawn.column_bytes)}"
    )
    return map_of_disk(drawn, looks, said)


def _axis(drawn: DiskMap) -> tuple[str, ...]:
    return tuple(
        short_size(drawn.virtual_size * mark // _MARKS_OF_AXIS)
        for mark in range(_MARKS_OF_AXIS + 1)
    )


def _checkpoint(one: PicturedCheckpoint, images: int) -> CheckpointRow:
    states = ["absent"] * images
    for cell in one.cells:
        states[cell.layer] = "tombstone" if cell.tombstone else cell.state
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    said = ", ".join(f"{state} in {counted(count, 'image')}" for state, count in counts.items())
    return CheckpointRow(
        name=one.name,
        verdict="usable" if one.usable else "unusable",
        look="good" if one.usable else "bad",
        reason=one.reason,
        next_backup="-" if one.next_backup_bytes is None else short_size(one.next_backup_bytes),
        states=states_of_checkpoint(states, said),
    )
