# SPDX-License-Identifier: Apache-2.0
"""QEMU's storage daemon, which copies what the native engine does not, and its protocol."""
