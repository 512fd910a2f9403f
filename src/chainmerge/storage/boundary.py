# SPDX-License-Identifier: Apache-2.0
"""What every public function promises: its arguments make sense, and its errors are ours."""

from __future__ import annotations

import inspect
from functools import cache, partial, wraps
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

from chainmerge.options import (
    Access,
    LiveOptions,
    MergeOptions,
    require_flag,
    require_instance,
    require_integer,
    require_path,
    require_paths,
    require_text,
    require_texts,
)
from chainmerge.storage.errors import system_errors_as_ours

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

P = ParamSpec("P")
T = TypeVar("T")

_OR_NONE: Final = " | None"
# By the annotation, which is text: everything of ours postpones the evaluation of annotations.
_CHECKS: Final[Mapping[str, Callable[[str, object], None]]] = MappingProxyType(
    {
        "str | Path": require_path,
        "Sequence[str | Path]": require_paths,
        "str": require_text,
        "Sequence[str]": require_texts,
        "int": require_integer,
        "bool": require_flag,
        **{
            kind.__name__: partial(require_instance, kind=kind)
            for kind in (Access, MergeOptions, LiveOptions)
        },
    }
)


@cache
def at_the_boundary(function: Callable[P, T]) -> Callable[P, T]:
    """The same function, which refuses odd arguments, and whose errors are errors of ours.

    Raises OptionUnusable for an argument that is not what its annotation says, or that no file
    can be called; SystemCallFailed and OutOfMemory for whatever else the operating system reports.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def guarded(*arguments: P.args, **options: P.kwargs) -> T:
        _require_usable(signature, signature.bind(*arguments, **options).arguments)
        with system_errors_as_ours():
            return function(*arguments, **options)

    return guarded


def _require_usable(signature: inspect.Signature, given: Mapping[str, object]) -> None:
    for name, value in given.items():
        annotation = str(signature.parameters[name].annotation)
        if value is None and annotation.endswith(_OR_NONE):
            continue
        check = _CHECKS.get(annotation.removesuffix(_OR_NONE))
        if check is not None:
            check(name, value)
