# SPDX-License-Identifier: Apache-2.0
"""Being told to stop."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from chainmerge.cli.signals import interrupted_by_signals, stopped_by_signals

if TYPE_CHECKING:
    from collections.abc import Iterator

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The handlers that the test runner had; none of them ignores (nohup) during the test."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_stopping_is_noted_however_often_it_is_asked_for(number: int) -> None:
    with stopped_by_signals() as should_stop:
        assert not should_stop()
        os.kill(os.getpid(), number)
        assert should_stop()
        os.kill(os.getpid(), number)
        assert should_stop()


@pytest.mark.parametrize("number", SIGNALS)
def test_elsewhere_every_signal_is_a_keyboard_interrupt(number: int) -> None:
    with pytest.raises(KeyboardInterrupt), interrupted_by_signals():
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_what_was_ignored_stays_ignored(number: int) -> None:
    signal.signal(number, signal.SIG_IGN)
    with interrupted_by_signals(), stopped_by_signals() as should_stop:
        os.kill(os.getpid(), number)
        assert not should_stop()


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with interrupted_by_signals(), stopped_by_signals():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
