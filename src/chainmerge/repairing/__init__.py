# SPDX-License-Identifier: Apache-2.0
"""What is wrong with an image, what mends it, and the way back."""
