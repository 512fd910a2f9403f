# SPDX-License-Identifier: Apache-2.0
"""``make bench``: measurements against QEMU's own tools, in pairs on the same images."""
