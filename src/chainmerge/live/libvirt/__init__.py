# SPDX-License-Identifier: Apache-2.0
"""A running domain, reached by libvirt's API alone."""
