# SPDX-License-Identifier: Apache-2.0
"""How large the image that is written must be, in bytes."""
