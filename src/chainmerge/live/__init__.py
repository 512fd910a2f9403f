# SPDX-License-Identifier: Apache-2.0
"""Merges in a running VM, done by its own QEMU; see docs/live-merge.md."""
