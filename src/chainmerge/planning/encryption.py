# SPDX-License-Identifier: Apache-2.0
"""Chains with encrypted images: QEMU reads and writes them, given files with the passphrases."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from chainmerge.options import ANY_IMAGE
from chainmerge.planning.errors import EncryptedImage, KeyFileUnusable
from chainmerge.qcow2.features import CryptMethod

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chainmerge.chain.model import Chain, ImageInfo
    from chainmerge.engines.qemu.nodes import ImageSpec
    from chainmerge.errors import ChainmergeError
    from chainmerge.options import MergeOptions


def has_encrypted(chain: Chain) -> bool:
    """Whether content of the chain can only be read with keys."""
    return any(image.encrypted for image in chain.images)


def key_obstacles(chain: Chain, options: MergeOptions) -> Iterator[ChainmergeError]:
    """What keeps QEMU from reading the encrypted images of a chain, found without asking it.

    Images below base count too: QEMU opens the whole chain, and verification reads it.
    """
    for image in chain.images:
        if not image.encrypted:
            continue
        assert image.header is not None
        if image.header.crypt_method is not CryptMethod.LUKS:
            problem = "with the old AES scheme, which QEMU itself advises against"
            yield EncryptedImage(str(image.path), problem)
            continue
        key_file = _key_file_of(image, options)
        if key_file is None:
            yield EncryptedImage(str(image.path), "and no file with its passphrase is given")
        elif not os.access(key_file, os.R_OK):
            yield KeyFileUnusable(key_file, str(image.path))


def _key_file_of(image: ImageInfo, options: MergeOptions) -> str | None:
    for path, key_file in options.key_files.items():
        if path != ANY_IMAGE and os.path.realpath(path) == str(image.real_path):
            return key_file
    return options.key_files.get(ANY_IMAGE)


def image_specs(chain: Chain, options: MergeOptions) -> list[ImageSpec]:
    """The chain as QEMU is to open it, from its root to top."""
    # Most chains have no use for it, nor for what compares them.
    from chainmerge.engines.qemu.nodes import ImageSpec  # noqa: PLC0415

    return [
        ImageSpec(
            path=str(image.real_path),
            format=image.format,
            is_block_device=image.is_block_device,
            data_file=str(image.data_file) if image.data_file else None,
            key_file=_key_file_of(image, options) if image.encrypted else None,
        )
        for image in chain.images
    ]


def require_keys_that_fit(chain: Chain, options: MergeOptions) -> None:
    """Have QEMU open the chain for reading.

    Raises ImageNotOpened, DaemonMissing.
    """
    # It takes a while to import, and most chains have no use for it.
    from chainmerge.engines.qemu.compare import require_openable  # noqa: PLC0415

    require_openable(image_specs(chain, options))


def encrypted_difference(
    chain: Chain, base_index: int, options: MergeOptions, should_stop: Callable[[], bool]
) -> str | None:
    """The first difference between what base and top show, in QEMU's words; None without one.

    Base's disk has at least the size of top's. Raises Interrupted, ImageNotOpened, DaemonMissing.
    """
    from chainmerge.engines.qemu.compare import content_difference  # noqa: PLC0415

    specs = image_specs(chain, options)
    return content_difference(specs, base_index, chain.top.virtual_size, should_stop)
