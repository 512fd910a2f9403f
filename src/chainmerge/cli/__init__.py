# SPDX-License-Identifier: Apache-2.0
"""The command line: a thin layer over :mod:`chainmerge.api`, one module a command."""
