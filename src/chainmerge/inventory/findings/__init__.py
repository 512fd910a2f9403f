# SPDX-License-Identifier: Apache-2.0
"""What is wrong with images and chains that were found: a module for each family. All pure."""
