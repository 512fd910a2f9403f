# SPDX-License-Identifier: Apache-2.0
"""``python -m chainmerge``."""

from __future__ import annotations

from chainmerge.cli.main import main

main()
