# SPDX-License-Identifier: Apache-2.0
"""The command that a plan names: the words that were typed, fit for a shell."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import pytest

from chainmerge.cli.flatten import flatten
from chainmerge.cli.live import live
from chainmerge.cli.merge import merge
from chainmerge.cli.plan import plan
from chainmerge.cli.typed import same_with

if TYPE_CHECKING:
    import click


@pytest.mark.parametrize(
    ("command", "typed", "expected"),
    [
        pytest.param(plan, "top.qcow2", "top.qcow2", id="an image"),
        pytest.param(plan, "a.qcow2 --delete b.qcow2", "--delete a.qcow2 b.qcow2", id="disks"),
        pytest.param(
            plan,
            "--base x --base=y --bandwidth 10M -v --json a b",
            "--base x --base y --bandwidth 10M a b",
            id="values as they were typed, and not how it is shown",
        ),
        pytest.param(
            plan,
            "--format a=raw --key-file a=k --format b=qcow2 a",
            "--format a=raw --key-file a=k --format b=qcow2 a",
            id="pairs",
        ),
        pytest.param(plan, "'a b.qcow2'", "'a b.qcow2'", id="what a shell would take apart"),
        pytest.param(merge, "-nv --base -v -- -odd", "--base -v -- -odd", id="a value like a flag"),
        pytest.param(
            plan,
            "--no-delete --no-history a",
            "--no-delete --no-history a",
            id="flags that are taken back",
        ),
        pytest.param(flatten, "-n --delete a", "--delete a", id="flatten"),
        pytest.param(
            live.commands["plan"],
            "a --qmp /run/qmp --device d0 --json",
            "--qmp /run/qmp --device d0 a",
            id="in a running VM",
        ),
    ],
)
def test_what_was_typed_is_said_again(command: click.Command, typed: str, expected: str) -> None:
    with command.make_context(command.name, shlex.split(typed)):
        assert same_with("merge") == f"chainmerge merge {expected}"
