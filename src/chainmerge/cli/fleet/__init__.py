# SPDX-License-Identifier: Apache-2.0
"""``chainmerge fleet``: its commands, and the file that says where the fleet is."""
