# SPDX-License-Identifier: Apache-2.0
"""When something reaches its limit, in words."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from chainmerge.arithmetic.counting import counted
from chainmerge.documents.trends import Limited
from chainmerge.report.text import short_size

if TYPE_CHECKING:
    from chainmerge.documents.trends import Forecast


def forecast_sentence(forecast: Forecast) -> str:
    """What reaches its limit on which day, and how far it is."""
    # time.strftime does without datetime, which takes a millisecond to import.
    day = time.strftime("%Y-%m-%d", time.localtime(forecast.reached_at))
    match forecast.kind:
        case Limited.CHAIN:
            has = f"{forecast.value} of {forecast.limit} images"
            reaches = f"the chain of {forecast.image} has {has}, and reaches that limit"
        case Limited.FILE_SYSTEM:
            reaches = f"the file system of {forecast.image} has {_left(forecast)}, and is full"
        case Limited.DEVICE:
            reaches = f"{forecast.image} has {_left(forecast)} behind the image's end, and is full"
    return f"{reaches} about {day}, by {counted(forecast.scans, 'scan')}"


def _left(forecast: Forecast) -> str:
    return f"{short_size(forecast.limit - forecast.value)} left"
