# SPDX-License-Identifier: Apache-2.0
"""The site's pages of the Python API: which names there are; Sphinx reads their docstrings."""

from __future__ import annotations

import inspect
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

import chainmerge
from chainmerge import api, live, options

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import ModuleType

_KINDS: Final[Mapping[str, str]] = {
    "functions": "Functions",
    "options": "Options",
    "documents": "What functions return",
    "errors": "Exceptions",
}


def python_pages(folder: str) -> dict[str, str]:
    """Return the pages by the names of their files in a folder, which ``index`` begins."""
    names: dict[str, list[str]] = {kind: [] for kind in _KINDS}
    for name in chainmerge.__all__:
        if name != "__version__":
            names[_kind_of(name)].append(name)
    pages = {kind: _page(title, chainmerge, names[kind]) for kind, title in _KINDS.items()}
    of_live = [name for name in live.__all__ if getattr(live, name) not in _public_classes()]
    pages["live"] = _page("In a running VM", live, of_live)
    tree = ["Python reference", "================", "", ".. toctree::", ""]
    tree += [f"   {kind}" for kind in ("functions", "live", "options", "documents", "errors")]
    pages["index"] = "\n".join(tree) + "\n"
    return {f"{folder}/{kind}.rst": text for kind, text in pages.items()}


def _public_classes() -> Iterator[type]:
    """The classes that the package itself gives, and that are described there."""
    return filter(inspect.isclass, (getattr(chainmerge, name) for name in chainmerge.__all__))


def _kind_of(name: str) -> str:
    found = getattr(chainmerge, name)
    if name in api.__all__:
        return "functions"
    if inspect.isclass(found) and issubclass(found, chainmerge.ChainmergeError):
        return "errors"
    return "options" if getattr(found, "__module__", "") == options.__name__ else "documents"


def _page(title: str, module: ModuleType, names: Sequence[str]) -> str:
    head = [title, "=" * len(title), "", f".. py:currentmodule:: {module.__name__}", ""]
    return "\n".join([*head, *(_entry(module, name) for name in names)])


def _entry(module: ModuleType, name: str) -> str:
    found = getattr(module, name)
    return "\n".join([f".. {_directive(found)}:: {module.__name__}.{name}", *_members(found), ""])


def _directive(found: Any) -> str:
    if inspect.isclass(found):
        return "autoexception" if issubclass(found, BaseException) else "autoclass"
    return "autofunction" if inspect.isfunction(found) else "autodata"


def _members(found: Any) -> Iterator[str]:
    if inspect.isclass(found) and not issubclass(found, BaseException):
        yield "   :members:"
        if issubclass(found, Enum):
            yield "   :undoc-members:"
