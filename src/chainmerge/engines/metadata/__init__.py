# SPDX-License-Identifier: Apache-2.0
"""Rewriting the metadata of a closed qcow2 image, all or nothing.

The caller holds the image's lock. ``docs/metadata-rewrite.md`` gives the order of the
writes and why it is safe to be interrupted anywhere in it.
"""
