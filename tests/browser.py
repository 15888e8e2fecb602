"""A real browser for the tests: headless Chromium, told what to do in its own protocol (DevTools)
over two pipes, so that nothing else has to be installed."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import threading
from contextlib import contextmanager
from types import SimpleNamespace

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PROGRAM = next((path for path in map(shutil.which, NAMES) if path), None)
MISSING = f"no browser is here: none of {', '.join(NAMES)} (on Debian: apt install chromium)"
TWO_FRAMES = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
WORDS = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe"


@contextmanager
def browser(width=1400, height=900):
    """An empty tab: an object with `to_browser`, `from_browser`, `session`, `requests` (addresses
    that were asked for) and `errors` (of scripts)."""
    command_read, command_write = os.pipe()
    reply_read, reply_write = os.pipe()

    def pipes():  # Chromium reads its commands from 3 and writes to 4
        spare = [os.dup(command_read), os.dup(reply_write)]  # neither is 3 or 4 then
        os.dup2(spare[0], 3)
        os.dup2(spare[1], 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words = [PROGRAM, *WORDS.split(), f"--user-data-dir={profile}"]
        words += [f"--window-size={width},{height}", "about:blank"]
        process = subprocess.Popen(
            words, preexec_fn=pipes, close_fds=False, stderr=subprocess.DEVNULL
        )
        os.close(command_read)
        os.close(reply_write)
        watch = threading.Timer(120, process.kill)  # a test that waits for ever fails instead
        watch.start()
        tab = SimpleNamespace(session=None, number=0, requests=[], errors=[])
        tab.to_browser = open(command_write, "wb", buffering=0)
        tab.from_browser = open(reply_read, "rb")
        tab.events = []
        try:
            pages = tell(tab, "Target.getTargets")["targetInfos"]
            [target] = [page["targetId"] for page in pages if page["type"] == "page"]
            attached = tell(tab, "Target.attachToTarget", targetId=target, flatten=True)
            tab.session = attached["sessionId"]
            for part in ("Page", "Runtime", "Network"):
                tell(tab, f"{part}.enable")
            yield tab
        finally:
            watch.cancel()
            process.terminate()
            process.wait()
            tab.to_browser.close()
            tab.from_browser.close()


def tell(tab, method, **parameters):
    """Send a command; its result."""
    tab.number += 1
    message = {"id": tab.number, "method": method, "params": parameters}
    if tab.session:
        message["sessionId"] = tab.session
    tab.to_browser.write(json.dumps(message).encode() + b"\0")
    while True:
        reply = read_message(tab)
        if reply.get("id") == tab.number:
            assert "error" not in reply, reply
            return reply["result"]


def read_message(tab):
    """The next thing that the browser says: a reply, or an event, which is noted."""
    said = b""
    while not said.endswith(b"\0"):
        byte = tab.from_browser.read(1)
        assert byte, "the browser has ended"
        said += byte
    message = json.loads(said[:-1])
    method = message.get("method")
    if method == "Network.requestWillBeSent":
        tab.requests.append(message["params"]["request"]["url"])
    if method == "Runtime.exceptionThrown":
        tab.errors.append(message["params"]["exceptionDetails"])
    if method:
        tab.events.append(method)
    return message


def visit(tab, address):
    """Load this address, and wait until that is done."""
    for url in ("about:blank", address):  # the first: another #place of a page is no new load
        tab.events.clear()
        tell(tab, "Page.navigate", url=url)
        while "Page.loadEventFired" not in tab.events:
            read_message(tab)


def script(tab, expression):
    """What this JavaScript gives; of a promise, what becomes of it."""
    how = {"returnByValue": True, "awaitPromise": True}
    done = tell(tab, "Runtime.evaluate", expression=expression, **how)
    assert "exceptionDetails" not in done, done
    return done["result"].get("value")


def press(tab, selector):
    """Bring that element to the middle of the window, and click on the middle of it."""
    element = f"document.querySelector({json.dumps(selector)})"
    script(tab, f"{element}.scrollIntoView({{block: 'center'}})")
    script(tab, TWO_FRAMES)  # a click falls on what is drawn
    place = f"(r => [r.x, r.y, r.width, r.height])({element}.getBoundingClientRect())"
    x, y, width, height = script(tab, place)
    where = {"x": x + width / 2, "y": y + height / 2, "button": "left", "clickCount": 1}
    for kind in ("mousePressed", "mouseReleased"):
        tell(tab, "Input.dispatchMouseEvent", type=kind, **where)


def picture(tab, path, whole=False):
    """The window as a picture; or the whole page."""
    shot = tell(tab, "Page.captureScreenshot", captureBeyondViewport=whole)
    path.write_bytes(base64.b64decode(shot["data"]))
