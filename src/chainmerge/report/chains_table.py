# SPDX-License-Identifier: Apache-2.0
"""The chains of a directory for people: which to merge first, and what that gains."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING

from chainmerge.arithmetic.counting import counted
from chainmerge.report import layout
from chainmerge.report.layout import Block, Words, stack, words
from chainmerge.report.names import ImageNames
from chainmerge.report.text import short_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.documents.chains import ChainsReport, ChainSummary


def chains_report(report: ChainsReport) -> Block:
    """A line for each chain of a directory, those that free most first."""
    if not report.chains:
        return words(f"no qcow2 images in {report.directory}", layout.QUIET)
    names = ImageNames(f"{report.directory.rstrip('/')}/")
    return stack(
        words(_headline(report), layout.TITLE),
        *_first_steps(report),
        layout.EMPTY_LINE,
        chains_listing(report.chains, names),
        *_problems(report.chains, names),
    )


def _headline(report: ChainsReport) -> str:
    chains = counted(len(report.chains), "chain")
    takes = short_size(report.occupied_bytes)
    verb = "takes" if len(report.chains) == 1 else "take"
    return (
        f"{chains} in {report.directory} {verb} {takes}; merging frees about "
        f"{short_size(report.freed_bytes)}"
    )


def _first_steps(report: ChainsReport) -> Iterator[Words]:
    """What to do about what was not finished, and the command for what frees most."""
    if any(chain.unfinished for chain in report.chains):
        yield layout.command_line(
            "Finish or cancel: ", f"chainmerge status {shlex.quote(report.directory)}"
        )
    worth = (one for one in report.chains if one.freed_bytes and _is_idle(one))
    for chain in worth:
        base, leaf = shlex.quote(_short(chain.base or "")), shlex.quote(_short(chain.leaf))
        yield layout.command_line(
            "Frees most: ", f"chainmerge plan --delete --keep-name --base {base} {leaf}"
        )
        return


def _is_idle(chain: ChainSummary) -> bool:
    return not (chain.users or chain.unfinished or chain.problem)


def _short(path: str) -> str:
    """A path as it is shorter to type from here."""
    here = os.path.relpath(path)
    return here if len(here) < len(path) else path


def chains_listing(chains: Sequence[ChainSummary], names: ImageNames) -> Block:
    """A line for each chain."""
    headings = ("leaf", "images", "disk", "on disk", "frees", "copies", "state")
    return layout.listing(
        headings,
        (
            (
                words(names.of(chain.leaf)),
                layout.number(chain.images),
                _size(chain.virtual_size),
                _size(chain.occupied_bytes),
                _size(chain.freed_bytes),
                _size(chain.bytes_to_copy),
                _state(chain),
            )
            for chain in chains
        ),
        right=headings[1:-1],
    )


def _size(value: int | None) -> Words:
    return words("-", layout.QUIET) if value is None else words(short_size(value))


def _state(chain: ChainSummary) -> Words:
    states = []
    if chain.problem is not None:
        states.append("unreadable" if chain.freed_bytes is None else "damaged")
    if chain.unfinished:
        states.append("unfinished")
    if chain.users:
        states.append(f"in use (pid {', '.join(str(user.pid) for user in chain.users)})")
    if states:
        return words(", ".join(states), layout.BAD if chain.problem else layout.CAUTION)
    return words("ok" if chain.users is not None else "ok, use not known", layout.QUIET)


def _problems(chains: Sequence[ChainSummary], names: ImageNames) -> Iterator[Block]:
    sentences = tuple(
        _with_name(names.of(chain.leaf), names.left_out_of(chain.problem))
        for chain in chains
        if chain.problem is not None
    )
    if sentences:
        yield layout.section("Not as it should be", layout.bullets(sentences, layout.CAUTION))


def _with_name(name: str, sentence: str) -> str:
    return sentence if sentence.startswith(name) else f"{name}: {sentence}"
