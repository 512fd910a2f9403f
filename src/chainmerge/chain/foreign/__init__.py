# SPDX-License-Identifier: Apache-2.0
"""Roots of chains in formats that only QEMU reads: vmdk, vdi, vhdx, vpc, qed and parallels.

QEMU says how large they are, and reads what is needed of them. Nothing here writes to them.
"""
