# SPDX-License-Identifier: Apache-2.0
"""An ordered chain of images: what an image stands on, and who else uses its parts."""
