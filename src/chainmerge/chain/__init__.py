# SPDX-License-Identifier: Apache-2.0
"""An ordered chain of images: what an image stands on, and who else uses its parts."""

from chainmerge.chain.discovery import discover
from chainmerge.chain.model import Chain, ChainPolicy, Identity, ImageFormat, ImageInfo, identity_of
from chainmerge.chain.reading import open_for_writing, open_image
from chainmerge.chain.relatives import ImageAbove, Relatives, find_relatives, find_users
from chainmerge.chain.surroundings import Searched

__all__ = [
    "Chain",
    "ChainPolicy",
    "Identity",
    "ImageAbove",
    "ImageFormat",
    "ImageInfo",
    "Relatives",
    "Searched",
    "discover",
    "find_relatives",
    "find_users",
    "identity_of",
    "open_for_writing",
    "open_image",
]
