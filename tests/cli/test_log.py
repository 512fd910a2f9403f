# SPDX-License-Identifier: Apache-2.0
"""Logs of commands: on standard error, beside results that are what they always are."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from typing import TYPE_CHECKING

from tests.support.cli import COMMAND, chainmerge, environment
from tests.support.operating import chain

if TYPE_CHECKING:
    from pathlib import Path


def test_a_merge_tells_its_steps(tmp_path: Path) -> None:
    _, top = chain(tmp_path, ("base", "top"))
    ran = chainmerge("--log-format", "json", "merge", "--json", top)
    lines = [json.loads(line) for line in ran.err.splitlines()]
    stages = [line["stage"] for line in lines if line["kind"] == "step"]
    assert stages[0] == "lock"
    assert "copy" in stages
    assert len(stages) == len(set(stages))
    assert lines[-1]["kind"] == "end"
    (report,) = ran.out.splitlines()
    assert json.loads(report)["event"] == "report"


def test_quiet_leaves_warnings_and_errors(tmp_path: Path) -> None:
    _, top = chain(tmp_path, ("base", "top"))
    assert chainmerge("--log-level", "debug", "merge", "-q", top).err == ""
    missing = tmp_path / "missing.qcow2"
    ran = chainmerge("--log-format", "text", "merge", "-q", missing)
    assert (ran.status, ran.out) == (3, "")
    (line,) = ran.err.splitlines()
    assert f"error: {missing}: no such file (image-missing); check the name" in line
    both = chainmerge("--log-format", "json", "info", "--json", missing)
    assert both.json["code"] == json.loads(both.err)["code"] == "image-missing"


def test_the_journal_is_told_the_level(tmp_path: Path) -> None:
    chain(tmp_path, ("base", "top"))
    with tempfile.TemporaryFile() as stream:
        status = os.fstat(stream.fileno())
        journal = f"{status.st_dev}:{status.st_ino}"
        subprocess.run(
            [*COMMAND, "--log-format", "text", "scan", "--no-cache", "--no-history", tmp_path],
            stderr=stream,
            stdout=subprocess.DEVNULL,
            env=environment(JOURNAL_STREAM=journal),
            check=True,
        )
        stream.seek(0)
        lines = stream.read().decode().splitlines()
    assert lines[0] == "<6>looking for images"
