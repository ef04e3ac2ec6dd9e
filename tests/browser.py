"""A real headless Chromium for tests, driven over its DevTools pipe: no driver, no socket, no network."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "headless_shell")


def find_browser() -> str | None:
    """`RAGDISTILL_CHROMIUM`, one on the path, or one that Playwright keeps; None where there is none."""
    found = [os.environ.get("RAGDISTILL_CHROMIUM"), *map(shutil.which, NAMES)]
    kept = sorted((Path.home() / ".cache/ms-playwright").glob("chromium*/chrome-*/*"))
    found += [str(p) for p in kept if p.name in ("chrome", "headless_shell") and os.access(p, os.X_OK)]
    return next(filter(None, found), None)


class Tab:
    """One page. Keeps what the console said, which exceptions were thrown and which addresses were asked for."""

    def __init__(self, reader: int, writer: int) -> None:
        self._in, self._out = os.fdopen(reader, "rb"), os.fdopen(writer, "wb")
        self._next, self._session = 0, ""
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One DevTools command; events that come first are kept."""
        self._next += 1
        message = {"id": self._next, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._next:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        raw = bytearray()
        while (byte := self._in.read(1)) != b"\0":
            assert byte, "the browser ended"
            raw += byte
        message = json.loads(raw)
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(params["exceptionDetails"])[:500])
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.complaints.append(json.dumps(params["args"])[:500])
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.complaints.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
        self._last = message.get("method", "")
        return message

    def open(self, url: str) -> None:
        """Go to `url` and wait until it is loaded."""
        self.call("Page.navigate", url=url)
        while self._last != "Page.loadEventFired":
            self._read()

    def run(self, script: str) -> Any:
        """Value of a JavaScript expression."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> None:
        """Until a JavaScript expression is true: for pages that go on building after they are loaded."""
        end = time.monotonic() + seconds
        while not self.run(f"!!({script})"):
            assert time.monotonic() < end, f"never true: {script}; the page reads: {self.text()[:2000]}"
            time.sleep(0.2)

    def text(self) -> str:
        """What a person reads on the page."""
        return self.run("document.body?.innerText ?? ''")

    def key(self, name: str) -> None:
        """Press a named key such as ArrowDown."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    def size(self, width: int, height: int = 900, dark: bool = False) -> None:
        """Window size in CSS pixels, and the colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path, top: float = 0, height: float | None = None) -> None:
        """Write a PNG of the whole page, or of `height` pixels from `top`.

        The window takes that size meanwhile: pages that build themselves may begin again. `screen` leaves it alone.
        """
        box = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": top, "width": box["width"], "height": height or box["height"] - top, "scale": 1}
        self._write(path, self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip))

    def screen(self, path: Path) -> None:
        """Write a PNG of what the window shows."""
        self._write(path, self.call("Page.captureScreenshot"))

    def _write(self, path: Path, shot: dict[str, Any]) -> None:
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def open_tab(browser: str, profile: Path) -> Iterator[Tab]:
    """A tab of a fresh headless browser that keeps its files below `profile`; ended afterwards."""
    to_browser, from_us = os.pipe()
    from_browser, to_us = os.pipe()
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
    flags += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    # DevTools' pipe is file descriptors 3 (commands) and 4 (answers).
    shell = f'exec "$@" 3<&{to_browser} 4>&{to_us}'
    process = subprocess.Popen(
        ["bash", "-c", shell, "browser", browser, *flags, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(to_browser, to_us), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"HOME": str(profile)},
    )  # fmt: skip
    os.close(to_browser)
    os.close(to_us)
    try:
        yield Tab(from_browser, from_us)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
