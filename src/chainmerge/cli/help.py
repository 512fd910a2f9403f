# SPDX-License-Identifier: Apache-2.0
"""Help, as rich-click formats it.

Commands are click's own, as rich-click takes longer to import than a small merge takes. When
somebody wants help, a command gets a twin that is rich-click's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from click import Group
from rich_click import RichCommand, RichContext, RichGroup

if TYPE_CHECKING:
    from click import Command, Context


def formatted_help(command: Command, context: Context) -> str:
    """Return the help of a command, fit for where it is printed."""
    twin = _twin_of(command, context)
    own = RichContext(
        twin,
        parent=context.parent,
        info_name=context.info_name,
        help_option_names=context.help_option_names,
    )
    return twin.get_help(own)


class _GroupInOrder(RichGroup):
    def list_commands(self, ctx: Context) -> list[str]:
        del ctx
        return list(self.commands)


def _twin_of(command: Command, context: Context) -> RichCommand:
    twin: RichCommand
    if isinstance(command, Group):
        twin = _GroupInOrder(name=command.name)
        for name in command.list_commands(context):
            within = command.get_command(context, name)
            if within is not None:
                twin.add_command(within, name)
    else:
        twin = RichCommand(name=command.name)
    twin.params, twin.help, twin.epilog = command.params, command.help, command.epilog
    return twin
