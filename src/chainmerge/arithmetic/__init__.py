# SPDX-License-Identifier: Apache-2.0
"""Numbers, whatever they count: rounding, and the types of arrays."""
