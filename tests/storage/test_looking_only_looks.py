# SPDX-License-Identifier: Apache-2.0
"""Commands that only look do not get into the way of a QEMU that opens the images meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import pytest

from tests.support.cli import environment
from tests.support.qemu import create

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OPENS: Final = 1000 if os.environ.get("CHAINMERGE_SOAK") == "1" else 200

# What is looked at may change while it is: that is said, and is no matter here.
LOOPS: Final = {
    "plan": "chainmerge.plan({top!r}, options=chainmerge.MergeOptions(delete=True))",
    "status": "chainmerge.status([{directory!r}])",
}
LOOP: Final = """
import chainmerge, contextlib
print("ready", flush=True)
while True:
    with contextlib.suppress(chainmerge.ChainmergeError):
        {step}
"""


@contextmanager
def in_a_loop(step: str) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP.format(step=step)], stdout=subprocess.PIPE, env=environment()
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


@pytest.mark.timeout(0)
@pytest.mark.parametrize("opened", ["base", "top"])
def test_no_open_of_qemus_fails_beside_plan_and_status(tmp_path: Path, opened: str) -> None:
    base = create(tmp_path / "base.qcow2", 1 << 20)
    top = create(tmp_path / "top.qcow2", backing=base)
    (tmp_path / ".base.qcow2.chainmerge-journal").write_text("so that status looks at base\n")
    image = {"base": base, "top": top}[opened]
    steps = [LOOPS[name].format(top=str(top), directory=str(tmp_path)) for name in LOOPS]
    failures = []
    with in_a_loop(steps[0]), in_a_loop(steps[1]):
        for _ in range(OPENS // 2):
            argv = ["qemu-io", "-f", "qcow2", "-c", "write 0 512", str(image)]
            ended = subprocess.run(argv, capture_output=True, text=True, check=False)
            if ended.returncode:
                failures.append(ended.stderr)
    assert not failures
