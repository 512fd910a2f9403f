# SPDX-License-Identifier: Apache-2.0
"""JSON schemas of the documents that commands print with ``--json``.

``python -m chainmerge.report.schema DIRECTORY`` writes them, one file a document.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import msgspec

from chainmerge.documents.bitmaps import (
    BitmapChange,
    BitmapListing,
    BitmapsOfDisks,
    BitmapsRepairReport,
    PruneOfDisks,
    PruneReport,
)
from chainmerge.documents.chain_pictures import ChainsPictures
from chainmerge.documents.chains import ChainsReport
from chainmerge.documents.configuration import ConfigurationCheck, ConfigurationReport
from chainmerge.documents.disks import DisksPlan, DisksReport
from chainmerge.documents.fleet import FleetChange, FleetResults, FleetStatus
from chainmerge.documents.fleet_inventory import (
    FleetInventory,
    FleetPictures,
    HostInventory,
)
from chainmerge.documents.fleet_policy import FleetPolicy
from chainmerge.documents.images import BackingReport, ChainReport, CheckResult, RelinkReport
from chainmerge.documents.log import LogLine
from chainmerge.documents.merge import Measurement, MergeReport
from chainmerge.documents.plan import MergePlan
from chainmerge.documents.progress import ProgressEvent
from chainmerge.documents.repair import CancelReport, RepairReport, UndoReport, VmRepairReport
from chainmerge.documents.retention import ThinOutPlan, ThinOutReport
from chainmerge.documents.scan import ScanReport
from chainmerge.documents.status import LiveStatusReport, StatusReport
from chainmerge.documents.versions import (
    FLEET_VERSION,
    PLAN_VERSION,
    REPORT_VERSION,
    STATUS_VERSION,
)
from chainmerge.report.json import ErrorReport

if TYPE_CHECKING:
    from collections.abc import Mapping

DOCUMENTS: Final[Mapping[str, type]] = MappingProxyType(
    {
        f"plan-{PLAN_VERSION}": MergePlan,
        f"progress-{REPORT_VERSION}": ProgressEvent,
        f"merge-{REPORT_VERSION}": MergeReport,
        f"merge-disks-{REPORT_VERSION}": DisksReport,
        f"plan-disks-{REPORT_VERSION}": DisksPlan,
        f"info-{REPORT_VERSION}": ChainReport,
        f"chains-{REPORT_VERSION}": ChainsReport,
        f"pictures-{REPORT_VERSION}": ChainsPictures,
        f"scan-{REPORT_VERSION}": ScanReport,
        f"check-{REPORT_VERSION}": CheckResult,
        f"measure-{REPORT_VERSION}": Measurement,
        f"bitmaps-list-{REPORT_VERSION}": BitmapListing,
        f"bitmaps-list-disks-{REPORT_VERSION}": BitmapsOfDisks,
        f"bitmaps-change-{REPORT_VERSION}": BitmapChange,
        f"bitmaps-prune-{REPORT_VERSION}": PruneReport,
        f"bitmaps-prune-disks-{REPORT_VERSION}": PruneOfDisks,
        f"bitmaps-repair-{REPORT_VERSION}": BitmapsRepairReport,
        f"backing-{REPORT_VERSION}": BackingReport,
        f"relink-{REPORT_VERSION}": RelinkReport,
        f"repair-{REPORT_VERSION}": RepairReport,
        f"repair-undo-{REPORT_VERSION}": UndoReport,
        f"plan-thin-out-{REPORT_VERSION}": ThinOutPlan,
        f"thin-out-{REPORT_VERSION}": ThinOutReport,
        f"cancel-{REPORT_VERSION}": CancelReport,
        f"status-{STATUS_VERSION}": StatusReport,
        f"live-status-{REPORT_VERSION}": LiveStatusReport,
        f"live-repair-{REPORT_VERSION}": VmRepairReport,
        f"log-{REPORT_VERSION}": LogLine,
        f"config-show-{REPORT_VERSION}": ConfigurationReport,
        f"config-check-{REPORT_VERSION}": ConfigurationCheck,
        f"fleet-status-{FLEET_VERSION}": FleetStatus,
        f"fleet-results-{FLEET_VERSION}": FleetResults,
        f"fleet-change-{FLEET_VERSION}": FleetChange,
        f"fleet-inventory-{FLEET_VERSION}": FleetInventory,
        f"fleet-look-{FLEET_VERSION}": HostInventory,
        f"fleet-report-{FLEET_VERSION}": FleetPictures,
        f"fleet-policy-{FLEET_VERSION}": FleetPolicy,
        f"error-{REPORT_VERSION}": ErrorReport,
    }
)
CONFIGURATION_SCHEMA: Final = "configuration-1.json"
"""What is made of the commands' options, and lies beside the schemas of documents."""
# "    name: text", and the lines below it that are indented further.
_ATTRIBUTE: Final = re.compile(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", re.MULTILINE)
# Cross references of the documentation: ":data:`~chainmerge.documents.versions.PLAN_VERSION`".
_ROLE: Final = re.compile(r":\w+:(`[^`]*`)")
_EVENTS: Final[Mapping[type, str]] = MappingProxyType(
    {
        ProgressEvent: "progress",
        MergeReport: "report",
        DisksReport: "report",
        RelinkReport: "report",
        ScanReport: "report",
        ThinOutReport: "report",
        ChainsPictures: "report",
        HostInventory: "report",
        ErrorReport: "error",
    }
)


def schema_of(document: type) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a report."""
    schema = msgspec.json.schema(document)
    for definition in schema["$defs"].values():
        _describe_fields(definition)
    if document in _EVENTS:
        described = schema["$defs"][document.__name__]
        event = {"const": _EVENTS[document]}
        described["properties"] = {"event": event, **described["properties"]}
        described["required"] = ["event", *described["required"]]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _describe_fields(definition: dict[str, Any]) -> None:
    """Move the ``Attributes:`` of a docstring to the fields that they describe."""
    summary, _, attributes = inspect.cleandoc(definition["description"]).partition(
        "\nAttributes:\n"
    )
    definition["description"] = _unwrapped(summary)
    for name, text in _ATTRIBUTE.findall(attributes):
        field = definition["properties"][name]
        # Beside a reference other keys are allowed since draft 2019-09.
        field["description"] = _unwrapped(text)


def _unwrapped(text: str) -> str:
    text = _ROLE.sub(r"\1", text)
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n"))


def schema_files() -> dict[str, str]:
    """Return the text of every schema file by its name."""
    return {
        f"{name}.json": json.dumps(schema_of(document), indent=2) + "\n"
        for name, document in DOCUMENTS.items()
    }


def main(directory: Path) -> None:
    """Write all schema files into *directory*, and remove those of documents that are gone."""
    directory.mkdir(parents=True, exist_ok=True)
    files = schema_files()
    for stale in directory.glob("*.json"):
        if stale.name not in {*files, CONFIGURATION_SCHEMA}:
            stale.unlink()
    for name, text in files.items():
        (directory / name).write_text(text, encoding="ascii")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
