# SPDX-License-Identifier: Apache-2.0
"""What outlives the process: the small files that a command leaves for the next one.

They lie beside the image, so that any host that sees the image sees them. Nothing outside
this package knows how they are named or what they look like inside. The history of this host lies
apart: it is about no image, and no merge needs it.
"""
