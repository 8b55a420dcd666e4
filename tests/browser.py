"""Pages in a real browser, Debian's chromium, driven over DevTools' pipe: no port, no library.

`with Page(url) as shown:` starts a browser for one page, a second's work; tests of many pages share a `Browser`.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")

SILENCE_SECONDS = 60
FLAGS = (
    "--headless --no-sandbox --disable-gpu --remote-debugging-pipe --no-first-run --disable-background-networking "
    "--disable-dev-shm-usage"
).split()
# Chromium reads commands from 3 and answers on 4; the pipes' own numbers may be these, so they come from 10 upward.
REDIRECT = 'exec "$@" 3<&{} 4>&{}'


class Browser:
    """A chromium without a window, for a `with`."""

    def __enter__(self) -> Browser:
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        (commands, self._write), (self._read, answers) = os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands, answers)]
        command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={self._profile.name}"]
        self._process = subprocess.Popen(
            ["bash", "-c", REDIRECT.format(*theirs), "bash", *command],
            pass_fds=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (commands, answers, *theirs):
            os.close(end)
        self._buffer, self._number = b"", 0
        self.events: list[dict[str, Any]] = []
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self.do("Browser.close")
                self._process.wait(30)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._write)
            os.close(self._read)
            self._profile.cleanup()

    def do(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The browser's answer to a command; events heard meanwhile are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while (said := self.next()).get("id") != self._number:
            pass
        assert "error" not in said, said
        result: dict[str, Any] = said["result"]
        return result

    def next(self) -> dict[str, Any]:
        """The next message."""
        while b"\0" not in self._buffer:
            assert select.select([self._read], [], [], SILENCE_SECONDS)[0], "the browser is silent"
            got = os.read(self._read, 1 << 20)
            assert got, "the browser is gone"
            self._buffer += got
        message, _, self._buffer = self._buffer.partition(b"\0")
        said: dict[str, Any] = json.loads(message)
        if "method" in said:
            self.events.append(said)
        return said


class Page:
    """A loaded page, for a `with`, in a browser of its own if none is given. `scheme` is "light" or "dark"."""

    def __init__(
        self, url: str, browser: Browser | None = None, *, width: int = 1200, height: int = 800, scheme: str = "light"
    ) -> None:
        self.url, self._given, self._size, self._scheme = url, browser, (width, height), scheme

    def __enter__(self) -> Page:
        self._browser = self._given or Browser().__enter__()
        try:
            self._target = self._browser.do("Target.createTarget", url="about:blank")["targetId"]
            attached = self._browser.do("Target.attachToTarget", targetId=self._target, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.do(f"{domain}.enable")
            width, height = self._size
            self.do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
            self.media("screen", self._scheme)
            self._browser.events.clear()
            answer = self.do("Page.navigate", url=self.url)
            assert "errorText" not in answer, answer
            while not self._heard("Page.loadEventFired"):
                self._browser.next()
            self.settle()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._given is None:
            self._browser.__exit__(kind, error, at)
        elif kind is None:
            self._browser.do("Target.closeTarget", targetId=self._target)

    def do(self, method: str, **params: Any) -> dict[str, Any]:
        """The page's answer to a DevTools command."""
        return self._browser.do(method, self._session, **params)

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript, awaited if it is a promise."""
        said = self.do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    def settle(self) -> None:
        """Waits for two frames, so that what observes sizes has run."""
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")

    def media(self, kind: str, scheme: str) -> None:
        """Shows the page as on "screen" or in "print"."""
        self.do("Emulation.setEmulatedMedia", media=kind, features=[{"name": "prefers-color-scheme", "value": scheme}])

    def press(self, identity: str) -> None:
        """Clicks on the middle of the element with this id, scrolled to if need be."""
        x, y = self.evaluate(f"""(element => {{
          element.scrollIntoViewIfNeeded();
          const box = element.getBoundingClientRect();
          return [box.x + box.width / 2, box.y + box.height / 2];
        }})(document.getElementById({json.dumps(identity)}))""")
        for kind in ("mousePressed", "mouseReleased"):
            self.do("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.settle()

    def key(self, key: str, code: int) -> None:
        """Presses a key; `code` is its Windows virtual key code."""
        text = {"Enter": "\r", "Tab": ""}.get(key, key)
        common = {"key": key, "windowsVirtualKeyCode": code}
        self.do("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.do("Input.dispatchKeyEvent", type="keyUp", **common)
        self.settle()

    def screenshot(self, path: Path) -> None:
        """Writes what is on the screen as PNG."""
        path.write_bytes(base64.b64decode(self.do("Page.captureScreenshot", format="png")["data"]))

    @property
    def errors(self) -> list[str]:
        """What the console holds so far: exceptions, violations of the policy, anything logged."""
        self.settle()
        thrown = [event["exceptionDetails"] for event in self._heard("Runtime.exceptionThrown")]
        said = [f"{details['text']} {details.get('exception', {}).get('description', '')}" for details in thrown]
        said += [event["entry"]["text"] for event in self._heard("Log.entryAdded")]
        return said + [str(event["args"]) for event in self._heard("Runtime.consoleAPICalled")]

    @property
    def requests(self) -> list[str]:
        """What the page has asked for so far, itself first; also what its policy then kept from leaving."""
        self.settle()
        return [event["request"]["url"] for event in self._heard("Network.requestWillBeSent")]

    def _heard(self, method: str) -> list[dict[str, Any]]:
        events = self._browser.events
        return [said["params"] for said in events if said["method"] == method and said["sessionId"] == self._session]
