# SPDX-License-Identifier: Apache-2.0
"""``make demo``: one snapshot, many stale bitmaps, a volume that cannot grow."""
