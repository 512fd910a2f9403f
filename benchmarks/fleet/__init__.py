# SPDX-License-Identifier: Apache-2.0
"""What a fleet of many workers costs: ``python -m benchmarks.fleet``."""
