# SPDX-License-Identifier: Apache-2.0
"""The storage under an image: files, block devices, logical volumes, and the locks on them.

Knows nothing of what an image holds.
"""
