# SPDX-License-Identifier: Apache-2.0
"""Images that a guest with bad intentions could have made, and what chainmerge does with them.

``make fuzz FUZZ_ARGS="--minutes 60 --seed 1"`` mutates the metadata of real images and runs every
command on them; ``test_fuzz.py`` runs a few of these cases, and those that once found something.
"""
