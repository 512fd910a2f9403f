# SPDX-License-Identifier: Apache-2.0
"""The native engine: merges into closed qcow2 and raw images without QEMU.

``docs/native-engine.md`` gives the order of the writes, and why it is safe to be interrupted
anywhere in it.
"""
