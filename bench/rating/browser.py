"""A headless Chromium, driven by the keyboard over the DevTools protocol."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from websockets.sync.client import connect
from websockets.sync.connection import Connection

SECONDS = 60  # they only bound a failure
CODES = {"Enter": 13, "Escape": 27, "Tab": 9}


def program() -> str | None:
    """Where Chromium is; None where it is not installed."""
    return next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser that remembers nothing."""
    found = program()
    assert found, "no Chromium is installed"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # whoever is root has no sandbox, nor has a container
        words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        words += ["--remote-debugging-port=0", f"--user-data-dir={folder}"]
        process = subprocess.Popen([found, *words, "about:blank"], stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr
            said = next(line for line in process.stderr if "DevTools listening" in line)
            yield Browser(re.sub(r"^.*ws://([^/]+)/.*$", r"\1", said.strip()))
        finally:
            process.kill()
            process.wait()


class Browser:
    """Gives pages.

    Args:
        host: and port that it listens at.
    """

    def __init__(self, host: str) -> None:
        self._host = host

    @contextmanager
    def page(self, address: str, *, width: int = 1280, height: int = 800, dark: bool = False) -> Iterator[Page]:
        """A page, once it is loaded."""
        with urlopen(Request(f"http://{self._host}/json/new?about:blank", method="PUT"), timeout=SECONDS) as reply:
            target = json.load(reply)["webSocketDebuggerUrl"]
        with connect(target, max_size=None, compression=None) as socket:
            page = Page(socket)
            page.look(width, height, dark=dark)
            page.open(address)
            yield page


class Page:
    """A page; what its scripts or its policy complain of is in `errors`."""

    def __init__(self, socket: Connection) -> None:
        self._socket, self._number = socket, 0
        self.errors: list[str] = []
        for domain in ("Runtime", "Log", "Page"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """Have the browser do something; what came of it."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=SECONDS))
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, message: Any) -> None:
        what, told = message.get("method"), message.get("params")
        thrown = what == "Runtime.exceptionThrown"
        logged = what == "Log.entryAdded" and told["entry"]["level"] == "error"
        if thrown or logged or (what == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert")):
            self.errors.append(json.dumps(told))

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def look(self, width: int, height: int, *, dark: bool) -> None:
        """How large the window is, and whether its user wants it dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def evaluate(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression of the page is true."""
        deadline = time.monotonic() + SECONDS
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"{expression}; on the page: {self.evaluate('document.body.innerText')}"
            time.sleep(0.02)

    def text(self, name: str) -> str:
        """The text of an element, by its id."""
        return str(self.evaluate(f"document.getElementById({json.dumps(name)}).textContent"))

    def press(self, key: str, *, control: bool = False) -> None:
        """Press a key and let it go."""
        code = CODES.get(key) or ord(key.upper())
        text = "\r" if key == "Enter" else key if len(key) == 1 else ""
        common = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 2 if control else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text and not control else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def write(self, text: str) -> None:
        """Write into what has the focus."""
        self.call("Input.insertText", text=text)

    def picture(self, place: Path) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


class RatingPage:
    """What a rater does at `/rate`.

    Args:
        page: on which it stands open.
    """

    def __init__(self, page: Page) -> None:
        self.page = page

    def enter(self, name: str) -> None:
        self.page.until("!document.getElementById('enter').hidden")
        self.page.write(name)
        self.page.press("Enter")
        self.page.until("!document.getElementById('standing').hidden")

    @property
    def done(self) -> int:
        """Ratings that the page shows as saved."""
        return int(self.page.text("count").partition(" ")[0])

    @property
    def pair(self) -> tuple[str, str, str] | None:
        """Prompt and both answers; None where nothing is left."""
        if self.page.evaluate("document.getElementById('task').hidden"):
            return None
        prompt = self.page.evaluate("document.querySelector('#prompt .turn:last-child p').textContent")
        return prompt, self.page.text("left"), self.page.text("right")

    def press(self, *keys: str) -> None:
        """Press keys that rate a pair, or take a rating back, and wait until that is saved."""
        before = self.done
        for key in keys:
            self.page.press(key)
        self.page.until(f"!document.getElementById('count').textContent.startsWith('{before} ')")

    def edit(self, side: str, text: str) -> None:
        """Prefer a side (1 or 2), with another text in its place."""
        before = self.done
        self.page.press("e")
        self.page.press(side)
        self.page.until("document.activeElement.id === 'edit'")
        self.page.evaluate("document.activeElement.select()")
        self.page.write(text)
        self.page.press("Enter", control=True)
        self.page.until(f"!document.getElementById('count').textContent.startsWith('{before} ')")
