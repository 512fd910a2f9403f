# SPDX-License-Identifier: Apache-2.0
"""What every public function promises: its arguments make sense, and its errors are ours."""

from __future__ import annotations

import inspect
from functools import cache, wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from chainmerge.options import require_fitting
from chainmerge.storage.errors import system_errors_as_ours

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")


@cache
def at_the_boundary(function: Callable[P, T]) -> Callable[P, T]:
    """The same function, which refuses odd arguments, and whose errors are errors of ours.

    Raises OptionUnusable for an argument that is not what its annotation says, or that no file
    can be called; SystemCallFailed and OutOfMemory for whatever else the operating system reports.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def guarded(*arguments: P.args, **options: P.kwargs) -> T:
        for name, value in signature.bind(*arguments, **options).arguments.items():
            require_fitting(name, value, str(signature.parameters[name].annotation))
        with system_errors_as_ours():
            return function(*arguments, **options)

    return guarded
