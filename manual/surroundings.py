# SPDX-License-Identifier: Apache-2.0
"""What no command says of itself: files that outlive it, and what it reads of the environment."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from chainmerge.records.files import STATE_DIRECTORY
from chainmerge.records.remains import KINDS

if TYPE_CHECKING:
    from collections.abc import Mapping

FILES: Final[Mapping[tuple[str, ...], str]] = MappingProxyType(
    {
        tuple(f".IMAGE.{kind.suffix}" for kind in KINDS): (
            "Beside an image: what a merge that was interrupted needs to be finished or undone. "
            "`chainmerge status` reads them; they go when the merge has ended. Do not delete them."
        ),
        (str(STATE_DIRECTORY),): "The same for images on block devices.",
        (
            "/etc/chainmerge/config.toml",
            "$XDG_CONFIG_HOME/chainmerge/config.toml",
            "~/.config/chainmerge/config.toml",
        ): (
            "What options are where they are not given, later ones over earlier ones (config show, "
            "config check, --no-config)."
        ),
        (
            "$XDG_STATE_HOME/chainmerge/history.sqlite",
            "~/.local/state/chainmerge/history.sqlite",
            f"{STATE_DIRECTORY}/history.sqlite",
        ): (
            "What merges and scans were like (--no-history), and what is known of images that have "
            "not changed since (scan --no-cache). The last one is root's. It may be deleted."
        ),
    }
)
"""Files, under all their names, and what they are for."""

ENVIRONMENT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "CHAINMERGE_CONFIG": "A configuration file that goes over all others; see FILES.",
        "COLUMNS": "How wide reports may become, where there is no terminal that says it.",
        "JOURNAL_STREAM": "Set by systemd: a log (--log-format) has levels for its journal.",
        "NO_COLOR": "If it is set and not empty, nothing is coloured.",
        "PATH": "Where QEMU's and LVM's commands are found, and the one of --lock-command.",
        "XDG_CONFIG_HOME": "Where the configuration of programs is; see FILES.",
        "XDG_STATE_HOME": "Where the state of programs is kept; see FILES.",
    }
)
"""Variables of the environment that users may set, and what they do."""
