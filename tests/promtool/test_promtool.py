# SPDX-License-Identifier: Apache-2.0
"""Prometheus' own tool accepts the metrics of a scan, and the alert rules do what they say."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Final

from chainmerge.report.metrics import metrics_of_scan
from tests.inventory.findings.building import chain
from tests.support.cli import chainmerge as run
from tests.support.reports import scan_report

RULES: Final = Path(__file__).parents[2] / "contrib" / "prometheus"


def promtool(*arguments: str | Path, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["promtool", *arguments], input=given, capture_output=True, check=False, timeout=60
    )


def test_the_metrics_of_a_real_scan(tmp_path: Path) -> None:
    chain(tmp_path, "disk", 3)
    file = tmp_path / "chainmerge.prom"
    assert run("scan", "-q", tmp_path, "--textfile", file).status == 0
    checked = promtool("check", "metrics", given=file.read_bytes())
    assert (checked.returncode, checked.stderr) == (0, b"")


def test_metrics_of_everything_that_can_be_found() -> None:
    text = metrics_of_scan(scan_report(words='odd "words"\n'))
    checked = promtool("check", "metrics", given=text)
    assert (checked.returncode, checked.stderr) == (0, b"")


def test_promtool_would_object() -> None:
    checked = promtool(
        "check", "metrics", given=b"# TYPE chainmerge_Size gauge\nchainmerge_Size 1\n"
    )
    assert checked.returncode == 3
    assert b"camelCase" in checked.stderr or b"no help text" in checked.stderr


def test_alerts_are_given_when_they_are_due() -> None:
    checked = promtool("check", "rules", RULES / "chainmerge.rules.yml")
    assert checked.returncode == 0, checked.stderr
    tested = promtool("test", "rules", RULES / "chainmerge.rules.test.yml")
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_the_tests_of_alerts_can_fail(tmp_path: Path) -> None:
    shutil.copytree(RULES, tmp_path, dirs_exist_ok=True)
    rules = tmp_path / "chainmerge.rules.yml"
    rules.write_text(rules.read_text().replace(">= 100", ">= 101"))
    tested = promtool("test", "rules", tmp_path / "chainmerge.rules.test.yml")
    assert tested.returncode == 1
    assert b"ChainmergeChainTooLong" in tested.stdout + tested.stderr
