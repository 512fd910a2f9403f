# SPDX-License-Identifier: Apache-2.0
"""The qcow2 format, read only: bytes to structures, and nothing of what is done with them.

Everything here takes an image as a :class:`~chainmerge.qcow2.readable.Readable`, trusts none of
its bytes, and raises a :class:`~chainmerge.qcow2.errors.FormatError` for what makes no sense.
"""
