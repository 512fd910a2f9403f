# SPDX-License-Identifier: Apache-2.0
"""The software bill of materials: what packages carry, with versions, licences and origins."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

from release.pins import tool
from release.project import ROOT, environment

if TYPE_CHECKING:
    from pathlib import Path

    from release.project import Project


def write_parts_list(project: Project, command: Path, into: Path) -> None:
    """Write ``chainmerge-VERSION.cdx.json``, CycloneDX of the environment of a command."""
    listed = into / f"chainmerge-{project.version}.cdx.json"
    describe = [
        *(tool("cyclonedx-py"), "environment", "--output-reproducible", "--validate"),
        *("--pyproject", str(ROOT / "pyproject.toml"), "--mc-type", "application"),
        *("--output-format", "JSON"),
        *("--output-file", str(listed)),
        str(command.parent.parent),
    ]
    subprocess.run(describe, env=environment(project), check=True, stderr=subprocess.DEVNULL)
    # The tool finds no version in pyproject.toml, which leaves it to the source.
    content = json.loads(listed.read_bytes())
    content["metadata"]["component"]["version"] = project.version
    listed.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
