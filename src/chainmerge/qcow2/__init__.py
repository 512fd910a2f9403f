# SPDX-License-Identifier: Apache-2.0
"""The qcow2 format, read-only: from bytes to structures, and no more.

Everything here takes an image as a :class:`~chainmerge.qcow2.readable.Readable`, trusts none of
its bytes, and raises a :class:`~chainmerge.qcow2.errors.FormatError` for invalid content.
"""
