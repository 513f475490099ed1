"""A headless Chromium and a server of the view, for tests, measurements and screenshots.

A `Watched` tab records what must not happen: errors and requests to other hosts.
"""

import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from flowgrain.view.app import create_app
from flowgrain.view.catalog import Catalog

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = (
    *("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


def missing() -> str | None:
    """Why there is no browser. None if there is one."""
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "playwright is not installed: pip install playwright"
    return None if chromium() else "Chromium is not installed"


def chromium() -> str | None:
    """The path of Chromium."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def until(tab: Any, expression: str, arg: Any = None, seconds: float = 30) -> None:
    """Wait until an expression is true in the page.

    The driver's own `wait_for_function` needs eval, which the policy of the pages forbids.
    """
    end = time.monotonic() + seconds
    while not tab.evaluate(expression, arg):
        assert time.monotonic() < end, f"not true after {seconds:g} s: {expression}"
        tab.wait_for_timeout(30)


@contextmanager
def serve(folders: Sequence[Path]) -> Iterator[str]:
    """A server of the view in a thread. Gives its address."""
    settings = uvicorn.Config(create_app(Catalog(folders)), port=0, log_level="warning")
    settings.timeout_graceful_shutdown = 1  # a page keeps its stream of changes open
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join(10)


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=chromium(), args=[*OPTIONS, *root])
        yield found
        found.close()


class Watched:
    """A tab of the browser.

    Args:
        browser: the browser.
        address: address of the server, or of an exported file.
        options: options of the tab, such as `viewport`.
    """

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.address = address
        self.tab = browser.new_page(**options)
        self.problems: list[str] = []
        """Errors of the console, errors of scripts, and requests to other hosts."""
        self.tab.on("console", self._console)
        self.tab.on("pageerror", lambda error: self.problems.append(f"script: {error}"))
        self.tab.on("request", self._request)

    def open(self, route: str) -> Any:
        """Go to a route such as "runs" and wait for its content. Returns the tab."""
        self.tab.goto(f"{self.address}#/{route}")
        self.tab.wait_for_selector("main .page")
        return self.tab

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(f"console: {message.text}")

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.problems.append(f"request to {request.url}")
