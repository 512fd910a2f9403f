# SPDX-License-Identifier: Apache-2.0
"""The lvm command itself: reports of every shape, and commands that do not end."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from chainmerge.storage import lvm, lvm_process
from chainmerge.storage.errors import CannotOpen
from chainmerge.storage.lvm import DeviceMapperName, LogicalVolume
from chainmerge.storage.volume_errors import LvmFailed, LvmUnfinished, NotALogicalVolume

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.fake_lvm import FakeLvm

EXTENT = 4 << 20


@pytest.fixture
def base(tmp_path: Path, fake_lvm: FakeLvm) -> LogicalVolume:
    fake_lvm.add_group("vg-1", 10, [])
    path = tmp_path / "lv"
    path.touch()
    os.truncate(path, 3 * EXTENT)
    fake_lvm.add_volume("vg-1", "base", path)
    return lvm.find_by_path("base", "vg-1/base")


def sysfs_with(directory: Path, device: int, uuid: str, name: str) -> Path:
    mapper = directory / "dev" / "block" / f"{os.major(device)}:{os.minor(device)}" / "dm"
    mapper.mkdir(parents=True)
    (mapper / "uuid").write_text(uuid + "\n")
    (mapper / "name").write_text(name + "\n")
    return directory


class TestDeviceMapper:
    DEVICE = os.makedev(253, 7)
    VG, LV = "3JHbXi0cGkSzp6xSdumGeaAsW9vVtygF", "wssI4f3yCiCyT1zmeQiBhGmjB092l1yu"

    def test_a_logical_volume(self, tmp_path: Path) -> None:
        sysfs = sysfs_with(tmp_path, self.DEVICE, f"LVM-{self.VG}{self.LV}", "my--vg-base")
        expected = DeviceMapperName("my--vg-base", self.VG, self.LV)
        assert lvm.device_mapper_name(self.DEVICE, sysfs) == expected
        assert lvm.device_mapper_name(os.makedev(253, 8), sysfs) is None

    @pytest.mark.parametrize(
        "uuid",
        ["CRYPT-LUKS2-0123456789abcdef-x", "mpath-3600", "", "LVM-short", f"LVM-{VG}{LV}-tdata"],
    )
    def test_other_mapped_devices(self, tmp_path: Path, uuid: str) -> None:
        sysfs = sysfs_with(tmp_path, self.DEVICE, uuid, "name")
        assert lvm.device_mapper_name(self.DEVICE, sysfs) is None

    def test_the_running_kernel(self) -> None:
        assert lvm.device_mapper_name(os.makedev(7, 0)) is None

    def test_lvm_must_mean_the_same_volume(self, base: LogicalVolume) -> None:
        same = DeviceMapperName("vg--1-base", base.vg_uuid, base.lv_uuid)
        assert lvm.find_by_device("image", same) == base
        for other in (
            DeviceMapperName("vg--1-base", base.vg_uuid, self.LV),
            DeviceMapperName("vg--1-base", self.VG, base.lv_uuid),
            DeviceMapperName("vg--1-none", base.vg_uuid, base.lv_uuid),
        ):
            with pytest.raises(NotALogicalVolume):
                lvm.find_by_device("image", other)


ROW = {
    "vg_name": "vg",
    "vg_uuid": "aaaaaa-bbbb",
    "lv_name": "lv",
    "lv_uuid": "cccccc-dddd",
    "lv_size": "100",
    "vg_extent_size": "10",
    "vg_free": "50",
    "segtype": "linear",
    "stripes": "1",
    "seg_start": "0",
}


class TestReports:
    def test_what_is_read(self, fake_lvm: FakeLvm) -> None:
        # As LVM with json_std: numbers, and the table of segments instead of that of volumes.
        numbers = {key: int(value) if value.isdecimal() else value for key, value in ROW.items()}
        self._let_lvm_say(fake_lvm, {"report": [{"seg": [numbers]}], "log": [{"log_type": "x"}]})
        assert lvm.find_by_path("image", "vg/lv") == LogicalVolume(
            name="vg/lv",
            vg_name="vg",
            vg_uuid="aaaaaabbbb",
            lv_uuid="ccccccdddd",
            size=100,
            extent_size=10,
            vg_free=50,
            segment_type="linear",
            stripes=1,
        )

    def test_the_last_segment_decides(self, fake_lvm: FakeLvm) -> None:
        rows = [ROW | {"seg_start": "40", "stripes": "3", "segtype": "striped"}, ROW]
        self._let_lvm_say(fake_lvm, {"report": [{"lv": rows}]})
        volume = lvm.find_by_path("image", "vg/lv")
        assert (volume.stripes, volume.growth_unit, volume.largest_size) == (3, 30, 130)

    @pytest.mark.parametrize(
        "report",
        [
            "", "no json", "[]", "{}", '{"report": 1}', '{"report": [{"lv": [1]}]}',
            '{"report": [{"lv": [{}]}]}', json.dumps({"report": [{"lv": [ROW | {"lv_size": ""}]}]}),
        ],
    )  # fmt: skip
    def test_what_cannot_be_read(self, fake_lvm: FakeLvm, report: str) -> None:
        fake_lvm.break_command("lvs", 0, "", report)
        with pytest.raises((LvmFailed, NotALogicalVolume)):
            lvm.find_by_path("image", "vg/lv")

    @pytest.mark.parametrize("rows", [[], [ROW, ROW | {"lv_name": "another"}]])
    def test_not_exactly_one_volume(self, fake_lvm: FakeLvm, rows: list[dict[str, str]]) -> None:
        self._let_lvm_say(fake_lvm, {"report": [{"lv": rows}]})
        with pytest.raises(NotALogicalVolume):
            lvm.find_by_path("image", "vg/lv")

    def test_messages_become_one_line(self, fake_lvm: FakeLvm) -> None:
        with pytest.raises(NotALogicalVolume) as caught:
            lvm.find_by_path("image", "no/such")
        assert caught.value.reason == (
            'Volume group "no" not found; Cannot process volume group no'
        )

    def test_a_name_like_an_option_is_a_name(self, fake_lvm: FakeLvm) -> None:
        with pytest.raises(NotALogicalVolume):
            lvm.find_by_path("image", "--help")
        assert fake_lvm.calls("lvs")[0][-2:] == ["--", "--help"]

    def test_a_lost_physical_volume(self, base: LogicalVolume, fake_lvm: FakeLvm) -> None:
        for devices in ([{"pv_name": "[unknown]", "vg_name": "vg-1"}], []):
            fake_lvm.break_command("pvs", 0, "", json.dumps({"report": [{"pv": devices}]}))
            with pytest.raises((CannotOpen, LvmFailed)):
                lvm.make_metadata_durable("image", base.vg_name)

    @staticmethod
    def _let_lvm_say(fake_lvm: FakeLvm, report: dict[str, Any]) -> None:
        fake_lvm.break_command("lvs", 0, "", json.dumps(report))


class TestCommandsThatDoNotEnd:
    @pytest.fixture(autouse=True)
    def _no_patience(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lvm_process, "_TIMEOUT_SECONDS", 1.0)
        monkeypatch.setattr(lvm_process, "_GRACE_SECONDS", 0.1)

    def test_a_change_that_can_be_stopped(self, base: LogicalVolume, fake_lvm: FakeLvm) -> None:
        fake_lvm.hang_command("lvextend", stubborn=False)
        with pytest.raises(LvmFailed) as caught:
            lvm.extend("image", base, 4 * EXTENT)
        assert caught.value.status == -signal.SIGTERM

    def test_a_change_that_cannot(self, base: LogicalVolume, fake_lvm: FakeLvm) -> None:
        fake_lvm.hang_command("lvextend", stubborn=True)
        with pytest.raises(LvmUnfinished) as caught:
            lvm.extend("image", base, 4 * EXTENT)
        assert caught.value.exit_code == 4
        # It was left alone; it is still a child of ours.
        assert os.waitpid(caught.value.pid, os.WNOHANG) == (0, 0)
        os.kill(caught.value.pid, signal.SIGKILL)
        os.waitpid(caught.value.pid, 0)

    def test_a_report(self, base: LogicalVolume, fake_lvm: FakeLvm) -> None:
        fake_lvm.hang_command("pvs", stubborn=False)
        with pytest.raises(LvmFailed):
            lvm.make_metadata_durable("image", base.vg_name)
