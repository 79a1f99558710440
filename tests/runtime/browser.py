"""Headless Chromium over its DevTools protocol (https://chromedevtools.github.io/devtools-protocol/)."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
# pages tell of blocked content only to themselves
WATCH = "addEventListener('securitypolicyviolation', e => console.error('CSP: ' + e.violatedDirective + e.blockedURI));"


def executable() -> str | None:
    """The browser's path, when there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """A browser with one page, for the length of a with block.

    Args:
        folder: for the browser's profile.
        answers: by ending of an address: (status, headers, body) that the page gets instead of the server's.
    """

    def __init__(self, folder: Path) -> None:
        self._profile = folder
        self.answers: dict[str, tuple[int, dict[str, str], str]] = {}
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.posted: list[dict[str, Any]] = []
        self._results: dict[int, dict[str, Any]] = {}
        self._changed = threading.Condition()
        self._session: str | None = None
        self._count = 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        self._browser = subprocess.Popen(
            [
                str(executable()),
                "--headless=new",
                "--remote-debugging-port=0",
                f"--user-data-dir={self._profile}",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
                *sandbox,
                "about:blank",
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._browser.stderr
        for line in self._browser.stderr:
            if match := re.search(r"DevTools listening on (ws://\S+)", line):
                break
        else:
            raise AssertionError("the browser ended before it listened")
        threading.Thread(target=self._browser.stderr.read, daemon=True).start()
        self._socket = self._stack.enter_context(connect(match[1], max_size=None, proxy=None))
        threading.Thread(target=self._listen, daemon=True).start()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Fetch.enable", patterns=[{"urlPattern": "*/v1/*"}])
        self.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        self.resize(1100, 800)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._browser.terminate()
        self._browser.wait(timeout=20)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its result."""
        number = self._send(method, parameters)
        with self._changed:
            assert self._changed.wait_for(lambda: number in self._results, timeout=30), method
            answer = self._results.pop(number)
        assert "error" not in answer, (method, answer)
        result: dict[str, Any] = answer["result"]
        return result

    def _send(self, method: str, parameters: dict[str, Any]) -> int:
        with self._changed:
            self._count += 1
            number = self._count
        message = {"id": number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message | ({"sessionId": self._session} if self._session else {})))
        return number

    def _listen(self) -> None:
        try:
            for text in self._socket:
                message = json.loads(text)
                if "id" in message:
                    with self._changed:
                        self._results[message["id"]] = message
                        self._changed.notify_all()
                else:
                    self._hear(message["method"], message["params"])
        except ConnectionClosed:
            return

    def _hear(self, event: str, told: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(told["exceptionDetails"]))
        elif event == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
        elif event == "Runtime.consoleAPICalled" and told["type"] == "error":
            self.errors.append(json.dumps(told["args"]))
        elif event == "Fetch.requestPaused":
            self._answer(told["requestId"], told["request"])

    def _answer(self, request: str, asked: dict[str, Any]) -> None:
        if "postData" in asked:
            self.posted.append({"headers": asked["headers"], "body": json.loads(asked["postData"])})
        found = next((reply for end, reply in self.answers.items() if asked["url"].endswith(end)), None)
        if found is None:
            self._send("Fetch.continueRequest", {"requestId": request})
            return
        status, headers, body = found
        listed = [{"name": name, "value": value} for name, value in headers.items()]
        encoded = base64.b64encode(body.encode()).decode()
        answer = {"requestId": request, "responseCode": status, "responseHeaders": listed, "body": encoded}
        self._send("Fetch.fulfillRequest", answer)

    def open(self, url: str) -> None:
        """Go there and wait until its scripts have run."""
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, code: str) -> Any:
        """The value of a JavaScript expression in the page; a promise is awaited."""
        done = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def until(self, code: str, seconds: float = 30) -> None:
        """Wait for a JavaScript expression to be true."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({code})"):
            assert time.monotonic() < end, f"not within {seconds} s: {code}; errors: {self.errors}"
            time.sleep(0.02)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        """A key, down and up."""
        text = {"text": "\r"} if key == "Enter" else {}
        codes = {"Enter": 13, "Escape": 27, "Tab": 9}
        common = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """Size in CSS pixels and the colours that the user prefers."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)

    def screenshot(self, path: Path) -> None:
        """As PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
