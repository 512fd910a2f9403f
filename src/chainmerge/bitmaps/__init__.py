# SPDX-License-Identifier: Apache-2.0
"""Dirty bitmaps: the rules by which they survive, what images store of them, and changes to them.

The rules are in :mod:`~chainmerge.bitmaps.rules`, and are pure.
"""
