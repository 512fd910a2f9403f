# SPDX-License-Identifier: Apache-2.0
"""The versions of the documents that functions return and commands print as JSON."""

from __future__ import annotations

PLAN_VERSION = 1
REPORT_VERSION = 1
STATUS_VERSION = 2
FLEET_VERSION = 1
