# SPDX-License-Identifier: Apache-2.0
"""Images that somebody has given are tried where there are any."""

from __future__ import annotations

import os

collect_ignore = [] if "CHAINMERGE_FIXTURES" in os.environ else ["test_given_images.py"]
