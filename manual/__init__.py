# SPDX-License-Identifier: Apache-2.0
"""What is made of the sources for readers: manual pages, the site, completions to install.

Nothing here is listed by hand that the program knows: commands and options are read from the
commands, errors from the catalogue, names from ``chainmerge.__all__``.
"""
