# SPDX-License-Identifier: Apache-2.0
"""A running VM, reached by a QMP monitor."""
