"""Headless Chromium over its debugging pipe (JSON ended by NUL bytes), with Python's standard library alone."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

BINARIES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def binary() -> str | None:
    """Return the browser of this machine: OREAL_CHROMIUM, or the first on the path."""
    return os.environ.get("OREAL_CHROMIUM") or next(filter(None, map(shutil.which, BINARIES)), None)


class Browser:
    """One tab. `messages` holds what pages wrote to the console, and errors, whatever their kind."""

    def __enter__(self) -> Browser:
        self.profile = tempfile.mkdtemp(prefix="browser")
        to_read, self.write_end = os.pipe()
        self.read_end, to_write = os.pipe()

        def give_pipes() -> None:  # the browser reads commands from 3 and answers on 4
            commands, answers = os.dup(to_read), os.dup(to_write)
            os.dup2(commands, 3)
            os.dup2(answers, 4)

        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run")
        command = [str(binary()), *options, f"--user-data-dir={self.profile}", "about:blank"]
        self.process = subprocess.Popen(
            command, preexec_fn=give_pipes, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        self.number, self.unread, self.messages, self.requests = 0, b"", [], []
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.command(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.read_end)
        os.close(self.write_end)
        shutil.rmtree(self.profile, ignore_errors=True)

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command, and return its result; events in between are noted."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if hasattr(self, "session"):
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self.unread:
            chunk = os.read(self.read_end, 1 << 20)
            if not chunk:
                raise RuntimeError("the browser has ended")
            self.unread += chunk
        text, _, self.unread = self.unread.partition(b"\0")
        message = json.loads(text)
        method = message.get("method", "")
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.messages.append(message["params"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        elif method == "Page.javascriptDialogOpening":
            self.messages.append(message["params"])
        elif method == "Page.loadEventFired":
            self.is_loaded = True
        return message

    def open(self, page: Path | str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Open a file, or a URL, in a window of this size."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])
        self.is_loaded = False
        self.command("Page.navigate", url=str(page) if "://" in str(page) else Path(page).resolve().as_uri())
        while not self.is_loaded:
            self._receive()

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression; a promise is awaited."""
        result = self.command("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"].get("description", result))
        return result["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        self.evaluate(
            "new Promise((done) => { const look = () => ("
            f"{condition}) ? done(true) : setTimeout(look, 20); look(); }})"
        )

    def screenshot(self, file: Path, clip: dict[str, float]) -> None:
        """Write a picture of a part of the page: x, y, width, height."""
        options = {"captureBeyondViewport": True, "clip": clip | {"scale": 1}}
        file.write_bytes(base64.b64decode(self.command("Page.captureScreenshot", **options)["data"]))
