# SPDX-License-Identifier: Apache-2.0
"""Reads a policy, strictly: what is not understood could be what keeps a chain from a merge."""

from __future__ import annotations

import difflib
import tomllib
from typing import TYPE_CHECKING, Any, Final

import msgspec

from chainmerge.documents.fleet_policy import (
    FleetPolicy,
    PolicyExceptions,
    PolicyMerging,
    PolicyRetention,
)
from chainmerge.fleet.errors import FleetPolicyUnusable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from msgspec import Struct

_TABLES: Final[Mapping[str, type[Struct]]] = {
    "retention": PolicyRetention,
    "merging": PolicyMerging,
    "leave_alone": PolicyExceptions,
}
DEFAULT_BANDWIDTH: Final = "default"
"""What stands in ``bandwidth`` for storages that it does not name."""


def policy_in(text: bytes, path: str) -> FleetPolicy:
    """Read a policy; *path* is what messages call it.

    Raises:
        FleetPolicyUnusable: it is not TOML, has a key that there is none of, or a value that makes
            no sense.
    """
    try:
        written = tomllib.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FleetPolicyUnusable(path, str(error)) from error
    for reason in _unknown_keys(written):
        raise FleetPolicyUnusable(path, reason)
    try:
        policy = msgspec.convert(written, FleetPolicy)
    except msgspec.ValidationError as error:
        raise FleetPolicyUnusable(path, _in_words(str(error))) from error
    retention = policy.retention
    if retention and retention.keep_last is None and not (retention.keep_within or retention.keep):
        reason = "[retention] needs keep_last, keep_within or keep: without one nothing would stay"
        raise FleetPolicyUnusable(path, reason)
    return policy


def _unknown_keys(written: Mapping[str, Any]) -> Iterator[str]:
    yield from _unknown_in(written, FleetPolicy, "")
    for name, kind in _TABLES.items():
        table = written.get(name)
        if isinstance(table, dict):
            yield from _unknown_in(table, kind, f"[{name}] ")


def _unknown_in(table: Mapping[str, Any], kind: type[Struct], where: str) -> Iterator[str]:
    known = kind.__struct_fields__
    for key in table:
        if key not in known:
            # Options are spelled with hyphens where keys have underscores.
            alike = difflib.get_close_matches(key.replace("-", "_"), known, n=2)
            meant = " or ".join(f"{one!r}" for one in alike)
            advice = f"did you mean {meant}?" if alike else f"there are {', '.join(known)}"
            yield f"{where}{key!r} is not a key of a policy: {advice}"


def _in_words(message: str) -> str:
    """What msgspec says of a value, by the name that it has in the file."""
    what, _, where = message.partition(" - at `$")
    name = where.rstrip("`").removeprefix(".")
    return f"{name}: {what}" if name else what
