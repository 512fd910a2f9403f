# SPDX-License-Identifier: Apache-2.0
r"""Reports for programs.

One object in, one line of ASCII out; the same object gives the same bytes. Names that are not UTF-8
keep their undecodable bytes as lone surrogates (``\udc80`` to ``\udcff``), the way Python's
``os.fsencode`` turns them back into bytes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

if TYPE_CHECKING:
    from chainmerge.errors import ChainmergeError


class ErrorReport(Struct, frozen=True):
    """What a program is told of an error; ``facts`` depend on the ``code``."""

    code: str
    message: str
    hint: str
    facts: dict[str, Any]


def encode(report: Any) -> str:
    """Encode a report, or anything made of records, as one line of JSON without its end.

    Fields come in the order of their definition, keys of mappings are sorted.
    """
    plain = msgspec.to_builtins(report, order="deterministic", enc_hook=str)
    # msgspec's own encoder refuses lone surrogates, which file names may contain.
    return json.dumps(plain, ensure_ascii=True, allow_nan=False)


def encode_event(event: str, fields: Any) -> str:
    """Encode a report as a line that says in its first field, ``event``, what it is."""
    return f'{{"event": {json.dumps(event)}, {encode(fields)[1:]}'


def encode_error(error: ChainmergeError) -> str:
    """Encode the last line of a command that did not do what was requested."""
    return encode_event(
        "error",
        ErrorReport(code=error.code, message=error.sentence, hint=error.advice, facts=error.facts),
    )
