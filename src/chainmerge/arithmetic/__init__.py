# SPDX-License-Identifier: Apache-2.0
"""Numbers, whatever they count: rounding, types of arrays, and how sentences name them."""
