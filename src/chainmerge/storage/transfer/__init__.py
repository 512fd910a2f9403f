# SPDX-License-Identifier: Apache-2.0
"""Moves data into an image: by threads, past the page cache, or by sharing extents."""
