# SPDX-License-Identifier: Apache-2.0
"""What there is on this host, and what could be gained: many chains at a glance. Reads only."""
