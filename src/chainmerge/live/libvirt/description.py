# SPDX-License-Identifier: Apache-2.0
"""The XML by which libvirt describes the disks of a domain, and checkpoints of them."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final
from xml.etree import ElementTree as ET

from msgspec import Struct

from chainmerge.qcow2.image import Qcow2Image
from chainmerge.storage.files import FileReadable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

# Types of disk sources that are a path: its attribute, and what QEMU opens it with.
_PATHS: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {"file": ("file", "file"), "block": ("dev", "host_device")}
)
_PROTOCOL_SUFFIX: Final = "-file"


class DiskLayer(Struct, frozen=True):
    """One image of a disk.

    Attributes:
        target: Its name in libvirt's API, such as ``vda[1]``.
        format: Its format, by QEMU's name.
        path: Where it lies; None where that is no path.
        protocol: What QEMU opens that with.
        reads_a_part: Whether it begins or ends in the middle of its file.
    """

    target: str
    format: str
    path: Path | None
    protocol: str
    reads_a_part: bool = False

    @property
    def protocol_node(self) -> str:
        """How we call the node of the file itself, which libvirt has no name for."""
        return self.target + _PROTOCOL_SUFFIX

    def virtual_size(self) -> int:
        """Bytes of the guest's disk that it has, as its header says now; 0 if nobody asks.

        Images of other formats than qcow2 and raw are the lowest ones, and are not written to.
        """
        if self.path is None or self.format not in {"qcow2", "raw"}:
            return 0
        with FileReadable(self.path) as readable:
            if self.format == "qcow2":
                return Qcow2Image(readable).header.virtual_size
            return readable.size

    def backing_name(self) -> str | None:
        """How its header names its backing file now."""
        assert self.path is not None
        with FileReadable(self.path) as readable:
            return Qcow2Image(readable).header.backing_name


def layer_above_protocol(node: str) -> str:
    """The name in libvirt's API of the image that lies in a protocol node."""
    return node.removesuffix(_PROTOCOL_SUFFIX)


def index_of(layer: str) -> str:
    """The number that a layer's name in libvirt's API has; empty if it has none."""
    return layer.partition("[")[2].rstrip("]")


def disks_of(domain: str) -> dict[str, list[DiskLayer]]:
    """The disks of a domain, by their targets, as layers from the active image down.

    Args:
        domain: its description.
    """
    disks = ET.fromstring(domain).findall("./devices/disk")  # noqa: S314  # libvirt's own
    targets = [(_attribute(disk, "target", "dev") or "?", disk) for disk in disks]
    return {target: list(_descend(disk, target)) for target, disk in targets}


def read_only_targets(domain: str) -> frozenset[str]:
    """The targets of the disks that the guest can only read, such as CD-ROMs."""
    disks = ET.fromstring(domain).findall("./devices/disk")  # noqa: S314  # libvirt's own
    only_read = (disk for disk in disks if disk.find("readonly") is not None)
    return frozenset(_attribute(disk, "target", "dev") or "?" for disk in only_read)


def targets_with_bitmaps(domain: str) -> dict[str, Path]:
    """The disks of a domain that can have bitmaps, by their targets: their active images.

    Those are disks of qcow2 images that the guest can write to; no backup asks others for any.

    Args:
        domain: its description.
    """
    disks = ET.fromstring(domain).findall("./devices/disk")  # noqa: S314  # libvirt's own
    writable = {
        _attribute(disk, "target", "dev")
        for disk in disks
        if disk.get("device", "disk") == "disk" and disk.find("readonly") is None
    }
    return {
        target: layers[0].path
        for target, layers in disks_of(domain).items()
        if target in writable and layers and layers[0].path and layers[0].format == "qcow2"
    }


def described_targets(disks: Mapping[str, Sequence[DiskLayer]]) -> str:
    """The disks with their active images, for a sentence."""
    known = (
        f"{target} ({layers[0].path or 'no file'})" if layers else f"{target} (empty)"
        for target, layers in sorted(disks.items())
    )
    return ", ".join(known) or "none"


def _descend(disk: ET.Element, target: str) -> Iterator[DiskLayer]:
    at: ET.Element | None = disk
    image_format = _attribute(disk, "driver", "type")
    while at is not None:
        source = at.find("source")
        if source is None:
            # The element that ends a chain has nothing in it.
            return
        index = at.get("index") or source.get("index")
        attribute, protocol = _PATHS.get(at.get("type", ""), ("", "unknown"))
        path = source.get(attribute)
        yield DiskLayer(
            f"{target}[{index}]",
            image_format or "raw",
            None if path is None else Path(path),
            protocol,
            source.find("slices") is not None,
        )
        at = at.find("backingStore")
        image_format = None if at is None else _attribute(at, "format", "type")


def _attribute(element: ET.Element, child: str, name: str) -> str | None:
    found = element.find(child)
    return None if found is None else found.get(name)


def checkpoint_description(name: str, disk: str) -> str:
    """A checkpoint of one disk alone, for a bitmap that libvirt has no checkpoint for."""
    checkpoint = ET.Element("domaincheckpoint")
    ET.SubElement(checkpoint, "name").text = name
    ET.SubElement(checkpoint, "creationTime").text = "0"
    disks = ET.SubElement(checkpoint, "disks")
    ET.SubElement(disks, "disk", name=disk, checkpoint="bitmap", bitmap=name)
    return ET.tostring(checkpoint, encoding="unicode")


def has_bitmap_on(disk: str, checkpoint: str) -> bool:
    """Whether a checkpoint, by its description, has a bitmap on a disk."""
    return disk in _disks_with_bitmaps(ET.fromstring(checkpoint))  # noqa: S314  # libvirt's own


def for_disk_alone(checkpoint: str, disk: str) -> str:
    """The description of a checkpoint, as if it was one of *disk* alone."""
    described = ET.fromstring(checkpoint)  # noqa: S314  # libvirt's own
    name = described.findtext("name") or ""
    disks = _disks_of_checkpoint(described)
    disks.clear()
    ET.SubElement(disks, "disk", name=disk, checkpoint="bitmap", bitmap=name)
    return ET.tostring(described, encoding="unicode")


def for_others_alone(checkpoint: str, disk: str) -> str | None:
    """The description of a checkpoint, as if it was none of *disk*; None if it is of no other."""
    described = ET.fromstring(checkpoint)  # noqa: S314  # libvirt's own
    others = {one.get("name", "") for one in _disks_of_checkpoint(described)} - {disk}
    return for_disks_alone(checkpoint, others)


def for_disks_alone(checkpoint: str, wanted: Collection[str]) -> str | None:
    """The description of a checkpoint, as if it was of *wanted* alone; None if it is of none."""
    described = ET.fromstring(checkpoint)  # noqa: S314  # libvirt's own
    disks = _disks_of_checkpoint(described)
    for one in disks.findall("disk"):
        if one.get("name") not in wanted:
            disks.remove(one)
    return ET.tostring(described, encoding="unicode") if _disks_with_bitmaps(described) else None


def _disks_of_checkpoint(described: ET.Element) -> ET.Element:
    found = described.find("disks")
    return ET.SubElement(described, "disks") if found is None else found


def _disks_with_bitmaps(described: ET.Element) -> set[str | None]:
    disks = described.findall("./disks/disk")
    return {one.get("name") for one in disks if one.get("checkpoint") == "bitmap"}
