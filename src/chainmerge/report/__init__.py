# SPDX-License-Identifier: Apache-2.0
"""Documents as people and programs read them: tables, trees, JSON, progress."""
