# SPDX-License-Identifier: Apache-2.0
"""VMs to merge in, by QMP and by libvirt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.libvirtd import libvirtd

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a libvirtd that is there for the tests alone."""
    with libvirtd(tmp_path_factory.mktemp("libvirt")) as uri:
        yield uri
