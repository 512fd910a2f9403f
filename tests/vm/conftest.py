# SPDX-License-Identifier: Apache-2.0
"""What the tests counted, at the end of a run, from whichever process counted it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _pytest.terminal import TerminalReporter

POWER_CUTS = "power cuts"


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    counted = {
        report.nodeid: text
        for report in terminalreporter.getreports("passed")
        for name, text in report.user_properties
        if name == POWER_CUTS
    }
    if not counted:
        return
    terminalreporter.section("states after power cuts")
    for case, text in sorted(counted.items()):
        terminalreporter.write_line(f"{case.partition('::')[2]}: {text}")
    total = sum(int(str(text).partition(" states")[0]) for text in counted.values())
    terminalreporter.write_line(f"{total} states of {len(counted)} commands, nothing lost")
