# SPDX-License-Identifier: Apache-2.0
"""What there is on this host, what could be gained, and what may go: chains at a glance.

All but :mod:`chainmerge.inventory.thin_out` only read.
"""
