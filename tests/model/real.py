# SPDX-License-Identifier: Apache-2.0
"""Real images: written by QEMU, merged by chainmerge.

The guest is a qemu-io, so it is QEMU that records in bitmaps what is written. Bitmaps are
added, removed and disabled by a qemu-storage-daemon, images are created by qemu-img, and a
crash is a SIGKILL. Merges run in this process; one that is to be killed in a child of it.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import chainmerge
from chainmerge.engines.qmp import StorageDaemon
from chainmerge.errors import Refused
from chainmerge.options import MergeOptions
from chainmerge.qcow2.bitmaps import read_bits, read_directory
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.results import state_of
from chainmerge.storage.files import FileReadable, WritablePort
from chainmerge.storage.locks import LockMode, lock_image
from chainmerge.types import ProgressEvent, Stage
from chainmerge.checkpoints import BitmapState
from chainmerge.view import GuestView, Layer, layer_of_qcow2, layer_of_raw
from tests.model.disk_history import Ending, KillPoint, MergeRequest, StoredBitmap
from tests.model.qemu_processes import Fill, Guest, Host, QemuBitmap, QemuDisagrees
from tests.support.qemu import create

KIB = 1 << 10
SECONDS_FOR_THE_DYING = 60

_REFUSED = 3
