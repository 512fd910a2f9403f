# SPDX-License-Identifier: Apache-2.0
"""A scan as metrics; what is in contrib asks for no other ones."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from chainmerge.errors import ExitCode
from chainmerge.report.metrics import METRICS_BEGINNING, metrics_of_scan, scan_metrics
from tests.inventory.findings.building import chain
from tests.support.cli import chainmerge
from tests.support.qemu import create
from tests.support.reports import scan_report

if TYPE_CHECKING:
    from chainmerge.documents.scan import ScanReport

CONTRIB: Final = Path(__file__).parents[2] / "contrib"


def samples(text: str) -> dict[tuple[str, ...], float]:
    """By the metric's name and the values of its labels, but for what was scanned."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.type == "gauge"
        assert family.documentation.endswith(".")
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "places"}
            found[sample.name, *(labels[name] for name in sorted(labels))] = sample.value
    return found


def samples_of(report: ScanReport) -> dict[tuple[str, ...], float]:
    return samples(metrics_of_scan(report).decode())


def test_metrics_of_a_scan(tmp_path: Path) -> None:
    images = [str(image) for image in chain(tmp_path, "disk", 3)]
    file = tmp_path / "chainmerge.prom"
    ran = chainmerge("scan", tmp_path, "--textfile", file, "--length-critical", "3", "--json")
    assert ran.status == 0, ran
    found = samples(file.read_text())
    assert found["chainmerge_images",] == 3
    assert found["chainmerge_chains",] == 1
    assert found["chainmerge_scan_start_time_seconds",] == ran.json["scanned_at"]
    assert found["chainmerge_occupied_bytes",] == ran.json["occupied_bytes"]
    assert found["chainmerge_reclaimable_bytes",] == ran.json["freed_bytes"] > 0
    assert found["chainmerge_findings", "critical"] == 1
    assert found["chainmerge_findings", "info"] == 0
    assert found["chainmerge_images_with_finding", "long-chain", "critical"] == 1
    assert found["chainmerge_chain_images", images[2]] == 3
    assert found["chainmerge_chain_unfinished_merge", images[2]] == 0
    assert found["chainmerge_chain_has_problem", images[2]] == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_what_is_not_known_is_left_out() -> None:
    report = scan_report()
    (known, *_) = report.chains
    unknown = replace(known, leaf="/disks/other", images=None, freed_bytes=None)
    found = samples_of(replace(report, chains=(known, unknown)))
    assert ("chainmerge_chain_images", known.leaf) in found
    assert ("chainmerge_chain_images", "/disks/other") not in found
    assert ("chainmerge_chain_reclaimable_bytes", "/disks/other") not in found
    assert found["chainmerge_chain_unfinished_merge", "/disks/other"] == unknown.unfinished
    assert found["chainmerge_limit_reached_time_seconds", "device", "/disks/odd"] == 86_400


@pytest.mark.parametrize("name", ['"quoted"\\', "new\nline", "\udcff", "\x1b[31m", "µ"])
def test_names_are_labels_whatever_is_in_them(name: str) -> None:
    text = metrics_of_scan(scan_report(words=name)).decode()
    assert samples(text)
    assert "\x1b" not in text
    for line in text.splitlines():
        assert line.startswith(("chainmerge_", "# HELP chainmerge_", "# TYPE chainmerge_"))


def test_an_older_file_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    image = create(tmp_path / "disk.qcow2", 1 << 20)
    before = image.read_bytes()
    ran = chainmerge("scan", "-q", tmp_path, "--textfile", image)
    assert (ran.status, image.read_bytes()) == (ExitCode.REFUSED, before)
    assert "is not a report of chainmerge" in ran.err
    file = tmp_path / "chainmerge.prom"
    for content in (b"", b"# HELP chainmerge_ of another version"):
        file.write_bytes(content)
        assert chainmerge("scan", "-q", tmp_path, "--textfile", file).status == 0
        assert file.read_text().startswith(METRICS_BEGINNING)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["chainmerge.prom", "disk.qcow2"]


def test_without_the_package(tmp_path: Path) -> None:
    (tmp_path / "prometheus_client.py").write_text("raise ImportError('it is not there')")
    path = f"{tmp_path}:{Path(__file__).parents[2] / 'src'}"
    ran = chainmerge("scan", tmp_path, "--textfile", tmp_path / "x", PYTHONPATH=path)
    assert ran.status == ExitCode.USAGE
    assert "pip install 'chainmerge[metrics]'" in ran.err
    assert not (tmp_path / "x").exists()
    assert chainmerge("explain", "metrics-missing", PYTHONPATH=path).status == 0


def known_names() -> set[str]:
    return {f"chainmerge_{metric.name}" for metric in scan_metrics(scan_report())}


@pytest.mark.parametrize("file", ["grafana/chainmerge.json", "prometheus/chainmerge.rules.yml"])
def test_what_is_asked_for_is_there(file: str) -> None:
    asked = set(re.findall(r"chainmerge_\w+", (CONTRIB / file).read_text()))
    assert len(asked) > 4
    assert asked <= known_names()


def test_every_metric_is_documented() -> None:
    text = (CONTRIB.parent / "docs" / "metrics.md").read_text()
    assert set(re.findall(r"`(chainmerge_\w+)`", text)) == known_names()


def test_the_dashboard_has_no_two_panels_in_one_place() -> None:
    dashboard = json.loads((CONTRIB / "grafana" / "chainmerge.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        taken |= cells
