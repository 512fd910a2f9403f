# SPDX-License-Identifier: Apache-2.0
"""An ``lvm`` command for machines without device mapper.

The executable ``lvm`` beside this file keeps volume groups and volumes in a JSON file, and its
volumes are regular files or loop devices that it resizes, links to, and forgets when they are
removed. Its arithmetic, exit statuses and messages are those that LVM 2.03.16 was seen to give.
:class:`FakeLvm` sets the scene.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import NAMESPACE_URL, uuid5

from chainmerge.records import identity
from chainmerge.storage import lvm

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

_STATE_VARIABLE: Final = "FAKE_LVM_STATE"


@dataclass(frozen=True)
class FakeLvm:
    """The state that the fake command works on, in *directory*."""

    directory: Path

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put the command on PATH, here and in processes started from here."""
        programs = self.directory / "bin"
        programs.mkdir(parents=True)
        command = shlex.join([sys.executable, "-S", "-E", str(Path(__file__).with_name("lvm"))])
        # What "python3" is on PATH may be slow to start, and this is started often.
        (programs / "lvm").write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
        (programs / "lvm").chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv(_STATE_VARIABLE, str(self.directory))
        state: dict[str, Any] = {"groups": {}, "volumes": [], "broken": {}}
        self._write({**state, "system_id": "", "version": "2.03.31", "numeric": False})

    def add_group(
        self, name: str, extents: int, devices: list[Path], extent_size: int = 4 << 20
    ) -> None:
        """Add a volume group of so many extents on *devices*."""
        state = self._read()
        state["groups"][name] = {
            "uuid": _uuid(name),
            "extents": extents,
            "extent_size": extent_size,
            "devices": [str(device) for device in devices],
            "system_id": "",
            "lock_type": "",
            "clustered": False,
        }
        self._write(state)

    def add_volume(
        self,
        group: str,
        name: str,
        path: Path,
        segment_type: str = "linear",
        stripes: int = 1,
        segments: int = 1,
    ) -> None:
        """Make the file or loop device *path* a volume; its size must be whole extents."""
        state = self._read()
        with path.open("rb") as volume:
            size = volume.seek(0, os.SEEK_END)
        extents, rest = divmod(size, state["groups"][group]["extent_size"])
        assert rest == 0, f"{path}: {size} bytes are not whole extents"
        state["volumes"].append(
            {
                "group": group,
                "name": name,
                "path": os.path.realpath(path),
                "uuid": _uuid(f"{group}/{name}"),
                "extents": extents,
                "segment_type": segment_type,
                "stripes": stripes,
                "segments": segments,
                "active": "exclusive",
                "attributes": "-wi-a-----",
                "kept_open": [],
                "made": int(time.time()),
            }
        )
        self._write(state)

    def add_pool(
        self, group: str, name: str, extents: int, used: float, chunk: int = 64 << 10
    ) -> None:
        """Add a thin pool, *used* of which (percent) are taken, and little of its metadata."""
        state = self._read()
        state["volumes"].append(
            {
                "group": group,
                "name": name,
                "path": "",
                "uuid": _uuid(f"{group}/{name}"),
                "extents": extents,
                "segment_type": "thin-pool",
                "stripes": 1,
                "segments": 1,
                "active": "exclusive",
                "attributes": "twi-aotz--",
                "kept_open": [],
                "made": int(time.time()),
                "metadata_extents": 2,
                "used": used,
                "metadata_used": 12.0,
                "chunk": chunk,
            }
        )
        self._write(state)

    def make_thin(self, name: str, pool: str) -> None:
        """Have a volume take its space from a pool."""
        state = self._read()
        for volume in state["volumes"]:
            if volume["name"] == name:
                volume |= {"segment_type": "thin", "stripes": 0, "pool": pool}
                volume["attributes"] = "Vwi-a-tz--"
        self._write(state)

    def set_pool(self, name: str, **changes: float) -> None:
        """Have a pool used in another way: ``used`` and ``metadata_used``, in percent."""
        state = self._read()
        for volume in state["volumes"]:
            if volume["name"] == name:
                volume.update(changes)
        self._write(state)

    @contextmanager
    def names_in_dev(self) -> Iterator[None]:
        """Have ``/dev/GROUP/VOLUME`` lead to the volumes, as long as they are called so.

        What this process has open of them by now does not count as their use.
        """
        state = self._read()
        for volume in (one for one in state["volumes"] if one["path"]):
            link = Path("/dev", volume["group"], volume["name"])
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(volume["path"])
            volume["kept_open"] = _descriptors_of(volume["path"])
        self._write(state)
        try:
            yield
        finally:
            for group in state["groups"]:
                shutil.rmtree(Path("/dev", group), ignore_errors=True)

    def take_down(self, name: str) -> None:
        """Have a volume that is linked to not active any more: the kernel does not know it."""
        self.activate_as(name, "")
        for volume in self._read()["volumes"]:
            if volume["name"] == name:
                Path("/dev", volume["group"], name).unlink()
                device = Path(volume["path"]).stat().st_rdev
                number = f"{os.major(device)}:{os.minor(device)}"
                shutil.rmtree(self.directory / "sys" / "dev" / "block" / number)

    def set_attributes(self, name: str, attributes: str) -> None:
        """Have ``lv_attr`` of a volume say something else than that it is a plain one."""
        state = self._read()
        for volume in state["volumes"]:
            if volume["name"] == name:
                volume["attributes"] = attributes
        self._write(state)

    def set_type(self, name: str, segment_type: str, stripes: int) -> None:
        """Have a volume on so many stripes, those with copies and parity included."""
        state = self._read()
        for volume in state["volumes"]:
            if volume["name"] == name:
                volume |= {"segment_type": segment_type, "stripes": stripes}
        self._write(state)

    def set_age(self, name: str, seconds: float) -> None:
        """Have a volume made so long ago."""
        state = self._read()
        for volume in state["volumes"]:
            if volume["name"] == name:
                volume["made"] = int(time.time() - seconds)
        self._write(state)

    def free(self, group: str) -> int:
        """Bytes of a group that no volume has."""
        command = ("lvm", "lvs", "--reportformat", "json", "-o", "vg_name,vg_free")
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows = json.loads(out)["report"][0]["lv"]
        return next(int(row["vg_free"]) for row in rows if row["vg_name"] == group)

    def names(self, group: str) -> dict[str, str]:
        """The volumes that a group has now: their UUIDs by their names."""
        volumes = self._read()["volumes"]
        return {one["name"]: one["uuid"] for one in volumes if one["group"] == group}

    def make_anew(self, group: str, name: str, path: Path, time: str = "again") -> None:
        """Another volume of a name that is free, on another device."""
        self.add_volume(group, name, path)
        state = self._read()
        volume = state["volumes"][-1]
        volume["uuid"] = _uuid(f"{group}/{name} {time}")
        volume["kept_open"] = _descriptors_of(volume["path"])
        Path("/dev", group, name).symlink_to(path)
        self._write(state)

    def move(self, name: str, group: str) -> None:
        """Have a volume in another group."""
        state = self._read()
        for volume in state["volumes"]:
            if volume["name"] == name:
                volume["group"] = group
        self._write(state)

    def share_group(
        self, name: str, *, lock_type: str = "", system_id: str = "", clustered: bool = False
    ) -> None:
        """Let several hosts know the volume group."""
        state = self._read()
        state["groups"][name] |= {
            "lock_type": lock_type,
            "system_id": system_id,
            "clustered": clustered,
        }
        self._write(state)

    def activate_as(self, name: str, how: str) -> None:
        """Have a volume active: ``exclusive``, ``shared``, ``elsewhere``, or not (empty)."""
        state = self._read()
        for volume in state["volumes"]:
            if volume["name"] == name:
                volume["active"] = how
        self._write(state)

    def behave(
        self, *, system_id: str = "", version: str = "2.03.31", numeric: bool = False
    ) -> None:
        """Be the lvm of a host with a system ID, of a version, or with binary values as numbers."""
        changes = {"system_id": system_id, "version": version, "numeric": numeric}
        self._write({**self._read(), **changes})

    def show_in_sysfs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let the volumes that are block devices look like those of the device mapper."""
        sysfs = self.directory / "sys"
        state = self._read()
        for volume in (one for one in state["volumes"] if one["path"]):
            device = Path(volume["path"]).stat().st_rdev
            place = sysfs / "dev" / "block" / f"{os.major(device)}:{os.minor(device)}" / "dm"
            place.mkdir(parents=True, exist_ok=True)
            uuids = state["groups"][volume["group"]]["uuid"] + volume["uuid"]
            (place / "uuid").write_text(f"LVM-{uuids.replace('-', '')}\n", encoding="ascii")
            name = "-".join(volume[part].replace("-", "--") for part in ("group", "name"))
            (place / "name").write_text(f"{name}\n", encoding="utf-8")
        shown = partial(lvm.device_mapper_name, sysfs=sysfs)
        monkeypatch.setattr(lvm, "device_mapper_name", shown)
        real_node = identity._node

        def node(device: int) -> Path:
            own = sysfs / "dev" / "block" / f"{os.major(device)}:{os.minor(device)}"
            return own if own.exists() else real_node(device)

        monkeypatch.setattr(identity, "_node", node)

    def break_command(self, command: str, status: int, message: str, output: str = "") -> None:
        """From now on *command* does nothing but say *message* and exit with *status*."""
        self._break(command, {"status": status, "message": message, "output": output})

    def hang_command(self, command: str, *, stubborn: bool) -> None:
        """From now on *command* never ends; a stubborn one not even on SIGTERM."""
        self._break(command, {"hang": "stubborn" if stubborn else "patient"})

    def kill_before(self, command: str) -> None:
        """From now on whoever calls *command* is killed before it does anything."""
        self._break(command, {"kills": True, "spared": True})

    def kill_after(self, command: str) -> None:
        """From now on whoever calls *command* is killed as soon as it has taken effect."""
        self._break(command, {"kills": True})

    def mend(self, command: str) -> None:
        """From now on *command* does what it does."""
        state = self._read()
        state["broken"].pop(command, None)
        self._write(state)

    def calls(self, command: str) -> list[list[str]]:
        """The arguments of every call of *command* so far."""
        log = self.directory / "calls"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        return [call[1:] for call in map(json.loads, lines) if call[0] == command]

    def _break(self, command: str, how: dict[str, Any]) -> None:
        state = self._read()
        state["broken"][command] = how
        self._write(state)

    def _read(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.directory / "state").read_text(encoding="utf-8"))
        return state

    def _write(self, state: dict[str, Any]) -> None:
        (self.directory / "state").write_text(json.dumps(state, indent=1), encoding="utf-8")


def _descriptors_of(device: str) -> list[int]:
    """Those that this process has of a device."""
    here = Path("/proc/self/fd")
    return [int(fd.name) for fd in here.iterdir() if os.path.realpath(fd) == device]


def _uuid(name: str) -> str:
    """As LVM writes it: 32 characters in groups of 6, 4, 4, 4, 4, 4, 6."""
    digits = uuid5(NAMESPACE_URL, name).hex
    ends = (0, 6, 10, 14, 18, 22, 26, 32)
    return "-".join(digits[start:end] for start, end in pairwise(ends))
