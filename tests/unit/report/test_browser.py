"""The report in a real browser: Chromium, driven by its DevTools protocol.

Skipped where there is no Chromium; Debian's package is `chromium`.
"""

import asyncio
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium (Debian: apt-get install chromium)"
)

_BAD = {"Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"}
_PROBE = """(() => {
  const click = (caption, column) => {
    const table = [...document.querySelectorAll("table")].find((t) => t.caption.innerText === caption);
    table.tHead.rows[0].cells[column].querySelector("button").click();
    return [table.tHead.rows[0].cells[column].getAttribute("aria-sort"),
            [...table.tBodies[0].rows].map((row) => row.cells[column].innerText)];
  };
  const images = [...document.images];
  return {
    loaded: images.length > 0 && images.every((image) => image.complete && image.naturalWidth > 0),
    harmed: typeof harmed,
    title: document.title,
    up: click("Classes of tuned", 3),
    down: click("Classes of tuned", 3),
    words: click("Classes of tuned", 0),
    hints: [...document.querySelectorAll("svg circle title")].some((t) => t.textContent === "update 1, loss: 5.9"),
    line: getComputedStyle(document.querySelector("svg polyline")).fill,
  };
})()"""
_WIDTH = """(() => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  return document.documentElement.scrollWidth;
})()"""


class Seen:
    """What the browser reported."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.widths: dict[int, int] = {}
        self.grounds: dict[str, str] = {}
        self.errors: list[Any] = []
        self.requests: list[str] = []


@pytest.fixture(scope="module")
def seen(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    profile = tmp_path_factory.mktemp("chromium")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command = [
        str(CHROMIUM),
        *options,
        "--remote-debugging-port=0",
        f"--user-data-dir={profile}",
        "about:blank",
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
        try:
            yield asyncio.run(_look(page, _port(profile)))
        finally:
            browser.kill()


def _port(profile: Path) -> int:
    """Chromium writes the port that it chose, and the path of its address, into its profile."""
    until = time.monotonic() + 90
    while time.monotonic() < until:
        file = profile / "DevToolsActivePort"
        if file.is_file() and len(lines := file.read_text().splitlines()) == 2:
            return int(lines[0])
        time.sleep(0.05)
    raise TimeoutError("Chromium did not start in 90 seconds")


async def _look(page: Path, port: int) -> Seen:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            target = next(t for t in await answer.json(content_type=None) if t["type"] == "page")
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            return await asyncio.wait_for(_Tab(socket).look(page), 120)


class _Tab:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.seen, self.number = socket, Seen(), 0

    async def look(self, page: Path) -> Seen:
        for part in ("Page", "Network", "Log", "Runtime"):
            await self.call(f"{part}.enable")
        await self.call("Page.navigate", url=page.as_uri())
        while await self.value("document.readyState") != "complete":
            await asyncio.sleep(0.05)
        self.seen.values = await self.value(_PROBE)
        for width in (360, 768, 1280):
            size = {"width": width, "height": 740, "deviceScaleFactor": 1, "mobile": False}
            await self.call("Emulation.setDeviceMetricsOverride", **size)
            self.seen.widths[width] = await self.value(_WIDTH)
        for scheme in ("light", "dark"):
            feature = {"name": "prefers-color-scheme", "value": scheme}
            await self.call("Emulation.setEmulatedMedia", features=[feature])
            self.seen.grounds[scheme] = await self.value("getComputedStyle(document.body).backgroundColor")
        return self.seen

    async def value(self, expression: str) -> Any:
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def call(self, method: str, **parameters: Any) -> Any:
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": parameters})
        while True:
            message = await self.socket.receive_json()
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            if message.get("method") in _BAD:
                self.seen.errors.append(message["params"])
            elif message.get("method") == "Network.requestWillBeSent":
                self.seen.requests.append(message["params"]["request"]["url"])


def test_it_opens_without_an_error_and_without_the_network(seen: Seen, page: Path) -> None:
    assert seen.errors == []
    assert [address for address in seen.requests if not address.startswith("data:")] == [page.as_uri()]
    assert seen.values["loaded"]


def test_hostile_names_are_shown_and_do_nothing(seen: Seen) -> None:
    assert seen.values["harmed"] == "undefined"
    assert seen.values["title"] == "About <script>harmed = true</script>"
    assert seen.values["words"][1][-1] == "x" * 150


def test_tables_sort(seen: Seen) -> None:
    state, figures = seen.values["up"]
    assert state == "ascending"
    assert [float(figure) for figure in figures] == sorted(float(figure) for figure in figures)
    assert len(set(figures)) == 4
    assert seen.values["down"] == ["descending", figures[::-1]]


def test_charts_show_values(seen: Seen) -> None:
    assert seen.values["hints"]
    assert seen.values["line"] == "none"  # a filled curve would hide the others


def test_the_page_never_scrolls_sideways(seen: Seen) -> None:
    assert all(needed <= width for width, needed in seen.widths.items()), seen.widths


def test_it_follows_light_and_dark(seen: Seen) -> None:
    assert seen.grounds == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}
