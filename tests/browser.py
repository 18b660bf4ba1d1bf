"""A real headless Chromium, driven over its own debugging protocol on two pipes: no driver, no library, no port.

The protocol: chromedevtools.github.io/devtools-protocol. With `--remote-debugging-pipe` Chromium reads commands from
descriptor 3 and writes answers and events to 4, each a JSON object that ends with a zero byte.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.waiting import one_at_a_time, wait_until

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL = ("apt-get", "install", "-y", "--no-install-recommends", "chromium")
INSTALL_SECONDS = 300.0
ANSWER_SECONDS = 60.0
"""The most that one answer may take: milliseconds are usual, the first one on a busy machine takes many seconds."""


LAUNCHER = """
import os, sys
reader, writer = map(int, sys.argv[1:3])
os.dup2(reader, 3)
os.dup2(writer, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Puts the pipes where Chromium looks for them, and becomes it."""


class BrowserUnavailable(Exception):
    """There is no Chromium, and it cannot be installed here."""


def find() -> str:
    """Chromium's path; installed where we may, as RabbitMQ is. Raises `BrowserUnavailable`."""
    with one_at_a_time("apt"):
        return next(filter(None, map(shutil.which, NAMES)), None) or _install()


def _install() -> str:
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise BrowserUnavailable(f"no Chromium here; run as root: {' '.join(INSTALL)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (("apt-get", "update", "-qq"), INSTALL):
        try:
            subprocess.run(command, env=environment, capture_output=True, timeout=INSTALL_SECONDS, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            raise BrowserUnavailable(f"{' '.join(command)} failed: {error}") from error
    if found := shutil.which("chromium"):
        return found
    raise BrowserUnavailable("no Chromium here, even after its installation")


class Tab:
    """One page. Every method returns once the browser has done it."""

    def __init__(self, browser: "Browser", target: str, session: str) -> None:
        self._browser = browser
        self._target = target
        self._session = session
        self.complaints: list[str] = []
        """What the console said, and what the browser refused or could not run."""
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol and its result."""
        return self._browser.send(method, self._session, **parameters)

    def close(self) -> None:
        """Leave it."""
        self._browser.send("Target.closeTarget", targetId=self._target)

    def go(self, url: str) -> None:
        """Navigate, and wait until the page is parsed and its script has run."""
        self.send("Page.navigate", url=url)
        wait_until(lambda: self.run("document.readyState") == "complete", ANSWER_SECONDS, f"{url} is loaded")

    def run(self, expression: str) -> Any:
        """The JSON value of an expression in the page; an AssertionError with what it threw."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def text(self, selector: str) -> str:
        """The text of the first element that matches, as it is shown; "" without any."""
        return str(self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def emulate(self, **features: str) -> None:
        """Media features, underscores for hyphens: `prefers_color_scheme="dark"`."""
        self.send(
            "Emulation.setEmulatedMedia",
            features=[{"name": name.replace("_", "-"), "value": value} for name, value in features.items()],
        )

    def size(self, width: int, height: int, *, scale: int = 1, phone: bool = False) -> None:
        """The window in CSS pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )

    def scripts(self, on: bool) -> None:
        """Whether pages may run scripts, from the next navigation on."""
        self.send("Emulation.setScriptExecutionDisabled", value=not on)

    def press(self, key: str, code: int, text: str = "") -> None:
        """A key, down and up; `code` is its Windows virtual key code."""
        named = {"key": key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown", **named, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **named)

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def heard(self, event: dict[str, Any]) -> None:
        """An event of this page."""
        match event["method"], event["params"]:
            case "Log.entryAdded", {"entry": entry}:
                self.complaints.append(f"{entry['level']}: {entry['text']} {entry.get('url', '')}".strip())
            case "Runtime.exceptionThrown", {"exceptionDetails": details}:
                self.complaints.append(str(details))
            case "Runtime.consoleAPICalled", {"args": arguments}:
                self.complaints.append(str(arguments))


class Browser:
    """A browser process with a profile of its own in `directory`."""

    def __init__(self, executable: str, directory: Path) -> None:
        self._number = 0
        self._rest = b""
        self._tabs: dict[str, Tab] = {}
        # When our ends close, Chromium ends: nothing is left behind, even if we are killed.
        self._reader, writer = os.pipe()
        reader, self._writer = os.pipe()
        # Above 4, so that the launcher does not overwrite one with the other.
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (reader, writer)]
        command = [
            *(sys.executable, "-I", "-S", "-c", LAUNCHER, *map(str, theirs)),
            executable,
            "--headless=new",
            "--remote-debugging-pipe",
            "--no-sandbox",  # as root there is none; it only ever sees our own page
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--no-proxy-server",
            "--disable-background-networking",
            "--disable-component-update",
            f"--user-data-dir={directory}",
            "about:blank",
        ]
        environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": str(directory), "TMPDIR": str(directory)}
        with (directory / "chromium.log").open("wb") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=theirs, start_new_session=True,
            )  # fmt: skip
        for end in (reader, writer, *theirs):
            os.close(end)

    def tab(self) -> Tab:
        """A new page."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = self._tabs[session] = Tab(self, target, session)
        return tab

    def send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """One command and its result; an AssertionError for an error or silence."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters}
        if session:
            command["sessionId"] = session
        os.write(self._writer, json.dumps(command).encode() + b"\0")
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            message = self._next(deadline, method)
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message['error']}"
                return dict(message["result"])
            if tab := self._tabs.get(message.get("sessionId", "")):
                tab.heard(message)

    def close(self) -> None:
        """End it and all its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._reader)
        os.close(self._writer)

    def _next(self, deadline: float, waiting_for: str) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._reader], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"{waiting_for}: no answer within {ANSWER_SECONDS:g} s"
            got = os.read(self._reader, 1 << 16)
            assert got, f"{waiting_for}: the browser ended"
            self._rest += got
        line, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(line))


@contextmanager
def browsing(directory: Path, give_up: Callable[[str], Any]) -> Iterator[Browser]:
    """A browser; `give_up` is called with the reason where there is none."""
    try:
        executable = find()
    except BrowserUnavailable as reason:
        give_up(str(reason))
        raise
    browser = Browser(executable, directory)
    try:
        yield browser
    finally:
        browser.close()
