# SPDX-License-Identifier: Apache-2.0
"""Words and numbers that are safe and pleasant to print."""

from __future__ import annotations

import time
from typing import Final

from chainmerge.arithmetic.counting import counted

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def rough_size(size: float) -> str:
    """Return *size* in bytes in the largest binary unit that fits, to one decimal.

    For numbers that change while people watch.
    """
    exponent = min((int(size).bit_length() - 1) // 10, len(_UNITS) - 1) if size >= 1 else 0
    return f"{size / (1 << (10 * exponent)):.1f} {_UNITS[exponent]}"


def short_size(size: int) -> str:
    """Return *size* in bytes to three digits, in the largest binary unit that fits.

    For sizes in sentences, where the exact number is said elsewhere.
    """
    exponent = min((abs(size).bit_length() - 1) // 10, len(_UNITS) - 1) if size else 0
    value = size / (1 << (10 * exponent))
    digits = f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"
    return f"{digits.rstrip('0').rstrip('.') if '.' in digits else digits} {_UNITS[exponent]}"


def shortened(sentence: str, most: int = 100) -> str:
    """Return *sentence*, or its beginning if it has more than *most* characters."""
    if len(sentence) <= most:
        return sentence
    return f"{sentence[:most].rsplit(' ', 1)[0].rstrip(' ,;:')} ..."


def human_size(size: int) -> str:
    """Return *size* in bytes as people say it: in the largest binary unit that fits."""
    exponent = min((abs(size).bit_length() - 1) // 10, len(_UNITS) - 1) if size else 0
    unit = 1 << (10 * exponent)
    digits = f"{size / unit:.2f}".rstrip("0").rstrip(".")
    # 1 MiB less one byte is not 1 MiB. A float could not tell that of 8 EiB.
    whole, _, hundredths = digits.partition(".")
    exact = size * 100 == int(whole + hundredths.ljust(2, "0")) * unit
    return f"{'' if exact else '~'}{digits} {_UNITS[exponent]}"


def exact_size(size: int) -> str:
    """Return *size* as people say it, with the exact number of bytes beside it."""
    return f"{human_size(size)} ({size} bytes)" if abs(size) >= 1024 else counted(size, "byte")


def short_time(seconds: float) -> str:
    """Return a duration in *seconds* to two digits, in units that people count in."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.0f} h" if hours < 48 else counted(round(hours / 24), "day")


def moment(seconds: float) -> str:
    """Return a time (seconds since 1970, UTC) as calendar and clock show it here."""
    # time.strftime does without datetime, which takes a millisecond to import.
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
