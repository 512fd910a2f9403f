# SPDX-License-Identifier: Apache-2.0
"""``chainmerge completion``."""

from __future__ import annotations

import click

from chainmerge.cli.commands import Command
from chainmerge.cli.shells import SHELLS, script_for
from chainmerge.cli.streams import write_report


@click.command(cls=Command)
@click.argument("shell", metavar="SHELL", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, *, shell: str) -> None:
    """Print the script that lets SHELL (bash, zsh or fish) complete words of chainmerge.

    bash: `source <(chainmerge completion bash)` in ~/.bashrc. zsh: the same with zsh in ~/.zshrc,
    after compinit. fish: `chainmerge completion fish | source` in ~/.config/fish/config.fish.
    """
    write_report(script_for(shell, ctx.find_root().command))
