# SPDX-License-Identifier: Apache-2.0
"""What a QEMU says of its own commands, by ``query-qmp-schema``. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


def takes_argument(schema: Sequence[dict[str, Any]], command: str, argument: str) -> bool:
    """Whether a command takes an argument.

    Args:
        schema: the answer to ``query-qmp-schema``.
        command: its name.
        argument: the argument's.
    """
    by_name = {entity["name"]: entity for entity in schema}
    known = by_name.get(command, {})
    arguments = by_name.get(known.get("arg-type", ""), {})
    return any(member["name"] == argument for member in arguments.get("members", ()))
