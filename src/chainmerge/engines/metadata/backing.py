# SPDX-License-Identifier: Apache-2.0
"""Giving a closed image another backing file: header only, in one switch."""

from __future__ import annotations

from msgspec.structs import replace

from chainmerge.engines.metadata.errors import BackingNameUnfit
from chainmerge.engines.metadata.header import compose_header, content_of
from chainmerge.engines.metadata.preconditions import require_not_corrupt
from chainmerge.engines.metadata.steps import Port, Step, StepName, write_steps
from chainmerge.qcow2.image import Qcow2Image


def change_backing(port: Port, backing_name: str | None, backing_format: str | None) -> None:
    """Make *backing_name* the image's backing file; None for none.

    The name is stored as given: one that is relative is looked up beside the image. The
    image's own data, bitmaps and refcounts are not touched, so a dirty image will do.

    Raises:
        ImageCorrupt: the image must be repaired first.
        BackingNameUnfit: QEMU could not read this name or format, or not in this image.
        HeaderFull: one sector write cannot switch to this name.
        RewriteFailed: nothing changed.
        SwitchUnknown: the image has the old backing file or the new one.
    """
    image = Qcow2Image(port)
    header = image.header
    require_not_corrupt(image)
    if backing_name is not None and header.raw_data_file:
        problem = "its data file must be a plain raw copy of the disk"
        raise BackingNameUnfit(image.name, "file name", backing_name, problem)
    content = replace(
        content_of(header),
        backing_name=backing_name,
        backing_format=backing_format if backing_name is not None else None,
    )
    cluster = port.read(0, header.cluster_size)
    head = compose_header(image.name, cluster, header, content)
    steps = [
        Step(StepName.FILL, lambda: head.beyond),
        Step(StepName.SWITCH, lambda: [(0, head.sector)]),
    ]
    write_steps(port, steps)
