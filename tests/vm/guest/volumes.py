# SPDX-License-Identifier: Apache-2.0
"""Volume groups and logical volumes, by the commands that an administrator would use."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.support.qemu import run

if TYPE_CHECKING:
    from collections.abc import Iterable

MIB: Final = 1 << 20
STALE: Final = 0xAA
"""What volumes hold that nobody has written to since somebody else used them."""


def scratch_disk(name: str) -> Path:
    """A disk that the machine was given under this name."""
    return Path("/dev/disk/by-id") / f"virtio-{name}"


@dataclass(frozen=True)
class Group:
    """A volume group."""

    name: str

    def path(self, volume: str) -> Path:
        return Path("/dev") / self.name / volume

    def mapper_path(self, volume: str) -> Path:
        return Path("/dev/mapper") / self.mapper_name(volume)

    def mapper_name(self, volume: str) -> str:
        """A dash in a name is doubled, as one alone parts the names."""
        return "-".join(each.replace("-", "--") for each in (self.name, volume))

    def create(self, volume: str, size: int, *options: str) -> Path:
        """A thick volume."""
        arguments = ("-q", "-y", "-Wn", "-L", f"{size}b", "-n", volume, *options)
        run("lvcreate", *arguments, self.name)
        return self.path(volume)

    def create_pool(self, pool: str, size: int) -> None:
        """A thin pool that fails writes when it is full, instead of letting them wait."""
        run("lvcreate", "-q", "-y", "-L", f"{size}b", "-T", f"{self.name}/{pool}")
        run("lvchange", "-q", "--errorwhenfull", "y", f"{self.name}/{pool}")

    def create_thin(self, pool: str, volume: str, size: int) -> Path:
        run("lvcreate", "-q", "-y", "-V", f"{size}b", "-T", f"{self.name}/{pool}", "-n", volume)
        return self.path(volume)

    def size_of(self, volume: str) -> int:
        return int(self._report(volume, "lv_size"))

    def uuids(self) -> dict[str, str]:
        """Those of all volumes, by their names."""
        return {row["lv_name"]: row["lv_uuid"] for row in self._rows("lv_name,lv_uuid")}

    def sizes(self) -> dict[str, int]:
        """Those of all volumes in bytes, by their UUIDs."""
        return {row["lv_uuid"]: int(row["lv_size"]) for row in self._rows("lv_uuid,lv_size")}

    def free(self) -> int:
        """Bytes that no volume has."""
        fields = ("--units", "b", "--nosuffix", "--noheadings", "-o", "vg_free")
        return int(run("vgs", *fields, self.name).stdout)

    def is_active(self, volume: str) -> bool:
        return self._report(volume, "lv_active") == "active"

    def used_of_pool(self, pool: str) -> float:
        """Percent."""
        return float(self._report(pool, "data_percent"))

    def deactivate(self, *volumes: str) -> None:
        run("lvchange", "-q", "-an", *(f"{self.name}/{volume}" for volume in volumes))

    def activate(self, *volumes: str) -> None:
        run("lvchange", "-q", "-ay", *(f"{self.name}/{volume}" for volume in volumes))

    def remove_volumes(self) -> None:
        """All of them, whatever state they are in."""
        run("lvremove", "-q", "-f", "-y", self.name)

    def _rows(self, fields: str) -> list[dict[str, str]]:
        out = run(
            "lvs", "--reportformat", "json", "--units", "b", "--nosuffix", "-o", fields, self.name
        ).stdout
        rows: list[dict[str, str]] = json.loads(out)["report"][0]["lv"]
        return rows

    def _report(self, volume: str, field: str) -> str:
        out = run(
            "lvs", "--reportformat", "json", "--units", "b", "--nosuffix", "-o", field,
            f"{self.name}/{volume}",
        ).stdout  # fmt: skip
        (row,) = json.loads(out)["report"][0]["lv"]
        return str(row[field])


def create_group(name: str, devices: Iterable[Path], extent_size: int = 4 * MIB) -> Group:
    """A volume group on devices that are full of old bytes."""
    paths = list(devices)
    for device in paths:
        fill(device)
        run("pvcreate", "-q", "-y", "-ff", device)
    run("vgcreate", "-q", "-s", f"{extent_size}b", name, *paths)
    return Group(name)


def remove_group(group: Group, devices: Iterable[Path]) -> None:
    run("vgremove", "-q", "-ff", "-y", group.name)
    run("pvremove", "-q", "-ff", "-y", *devices)


def fill(device: Path) -> None:
    """Overwrite all of a device, past the page cache as others will read it."""
    piece = bytes([STALE]) * MIB
    with device.open("r+b", buffering=0) as target:
        end = target.seek(0, os.SEEK_END)
        target.seek(0)
        while (rest := end - target.tell()) > 0:
            target.write(piece[:rest])
        os.fsync(target.fileno())
