# SPDX-License-Identifier: Apache-2.0
"""A real browser, Debian's chromium without a window, driven by its own protocol over a pipe."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COMMANDS: Final = ("chromium", "chromium-browser", "google-chrome")
SECONDS_TO_END: Final = 60
_OF_THE_BROWSER: Final = 5
"""Descriptors below this one."""


class BrowserFailed(AssertionError):
    """The browser is not there, did not start, or refused what it was told."""


class Browser:
    """A page in the browser."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._write = to_browser
        self._answers = os.fdopen(from_browser, "rb", buffering=0)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Tell the browser something, and return its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while True:
            answer = self._next()
            if answer.get("id") != self._number:
                self.events.append(answer)
                continue
            if "error" in answer:
                raise BrowserFailed(f"{method}: {answer['error']}")
            result: dict[str, Any] = answer["result"]
            return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = self._answers.read(1 << 20)
            if not piece:
                raise BrowserFailed("it ended")
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        decoded: dict[str, Any] = json.loads(message)
        return decoded

    def wait_for(self, event: str) -> dict[str, Any]:
        """The next event of that name that was not taken yet."""
        while True:
            for index, one in enumerate(self.events):
                if one.get("method") == event:
                    return self.events.pop(index)
            self.events.append(self._next())

    def open(self, page: Path, width: int, *, dark: bool = False, medium: str = "screen") -> None:
        """Show a file in a window of so many pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=medium, features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        self.wait_for("Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise BrowserFailed(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def requests(self) -> list[str]:
        """What the page has asked for since it was opened, itself included."""
        return [
            one["params"]["request"]["url"]
            for one in self.events
            if one.get("method") == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[str]:
        """What the browser has written to its console."""
        return [
            one["params"]["entry"]["text"]
            for one in self.events
            if one.get("method") == "Log.entryAdded"
        ]

    def screenshot(self, file: Path) -> None:
        """Write a picture of the whole page."""
        width, height = self.evaluate("[innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        taken = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(taken["data"]))


def _pipe() -> tuple[int, int]:
    """A pipe whose ends are none of the descriptors that the browser uses."""
    ends = os.pipe()
    higher = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, _OF_THE_BROWSER) for end in ends)
    for end in ends:
        os.close(end)
    return higher[0], higher[1]


@contextlib.contextmanager
def running_browser() -> Iterator[Browser]:
    """A browser of one's own, gone afterwards."""
    command = next(filter(None, map(shutil.which, COMMANDS)), None)
    if command is None:
        raise BrowserFailed("there is no chromium: apt-get install chromium")
    to_browser, write = _pipe()
    read, from_browser = _pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The protocol is spoken over descriptors 3 and 4.
        process = subprocess.Popen(
            [
                # Unlike others, this shell knows descriptors of more than one digit.
                "bash",
                "-c",
                f'exec "$@" 3<&{to_browser} 4>&{from_browser}',
                "bash",
                command,
                "--headless=new",
                "--remote-debugging-pipe",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--force-color-profile=srgb",
                "--disable-lcd-text",
                f"--user-data-dir={profile}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(to_browser, from_browser),
        )
        os.close(to_browser)
        os.close(from_browser)
        try:
            yield Browser(write, read)
        finally:
            os.close(write)
            try:
                process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
