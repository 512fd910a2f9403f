# SPDX-License-Identifier: Apache-2.0
"""A merge of closed images: prepare, execute, verify, settle; and what an interrupted one left.

:mod:`~chainmerge.merging.merge` is where to begin reading.
"""
