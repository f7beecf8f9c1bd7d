"""A headless Chromium that tests click through, by the Chrome DevTools protocol."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from contextlib import contextmanager
from itertools import count
from urllib.request import urlopen

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-sync"),
)


class Page:
    """One tab.

    Args:
        socket: to its debugger.
    """

    def __init__(self, socket):
        self.socket, self.numbers = socket, count()

    def call(self, method, **parameters):
        """A command of the protocol, and its result."""
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self.socket.recv(timeout=60))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, script):
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, script, seconds=60):
        """The value of an expression once it is neither false nor empty."""
        ends = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < ends, f"{script} did not come true; the page says: {self.text()}"
            time.sleep(0.1)
        return value

    def text(self):
        return self.run("document.body ? document.body.innerText : ''")

    def choose_file(self, selector, path):
        """Give a file to an input of files."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def press(self, key, code):
        """A key, in what has the focus."""
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)

    def write(self, text):
        """Text, in what has the focus."""
        self.call("Input.insertText", text=text)

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def browser(profile, address, width=1400, height=1000):
    """A tab that shows an address; the browser ends with it."""
    from websockets.sync.client import connect

    options = [*QUIET, f"--user-data-dir={profile}", "--remote-debugging-port=0", f"--window-size={width},{height}"]
    process = subprocess.Popen(
        [CHROMIUM, *options, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        ends = time.monotonic() + 60
        while not (profile / "DevToolsActivePort").exists() or not (profile / "DevToolsActivePort").read_text():
            assert time.monotonic() < ends and process.poll() is None, "Chromium does not start"
            time.sleep(0.1)
        port = (profile / "DevToolsActivePort").read_text().splitlines()[0]
        with urlopen(f"http://127.0.0.1:{port}/json") as answer:
            (tab,) = (each for each in json.load(answer) if each["type"] == "page")
        with connect(tab["webSocketDebuggerUrl"], max_size=None, proxy=None) as socket:
            page = Page(socket)
            page.call("Page.navigate", url=address)
            yield page
    finally:
        process.terminate()
        process.wait(20)
