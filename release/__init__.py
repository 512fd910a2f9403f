# SPDX-License-Identifier: Apache-2.0
"""What a release is made of: source, wheel, packages, one file, and what vouches for them."""
