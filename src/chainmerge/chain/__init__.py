# SPDX-License-Identifier: Apache-2.0
"""An ordered chain of images: its backing files, and who else uses them."""
