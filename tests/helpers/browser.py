"""The operating system's Chromium, driven by playwright: for pages that have to work, not only to exist."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZE = {"width": 1280, "height": 900}


def chromium() -> str:
    """Where the browser is. A machine that runs these tests must have one: its absence is a failure, no reason to skip."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    return pytest.fail("there is no Chromium here: install your system's package (Debian: apt-get install chromium)")


@contextmanager
def browser(*options: str) -> Iterator[Any]:
    """A headless browser of playwright's."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("playwright is not installed: pip install playwright (its own browsers are not needed)")
    path = chromium()
    with sync_playwright() as playwright:
        # as root, which CI often is, Chromium has no sandbox; small shared memory is usual in containers
        running = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage", *options]
        )
        try:
            yield running
        finally:
            running.close()


class Opened:
    """A local file in a page without a network, and what happened there.

    Attributes:
        page: playwright's page.
        asked: every address that was asked for, but for the file itself.
        said: errors and warnings of the console, and exceptions.
    """

    def __init__(self, running: Any, file: Path, **options: Any) -> None:
        self.asked: list[str] = []
        self.said: list[str] = []
        self.address = file.resolve().as_uri()
        context = running.new_context(**({"viewport": SIZE, "offline": True} | options))
        context.route("**/*", self._route)
        self.page = context.new_page()
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", self._dialog)
        self.page.goto(self.address)

    def _route(self, route: Any) -> None:
        if route.request.url == self.address:
            route.continue_()
        else:
            self.asked.append(route.request.url)
            route.abort()

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.said.append(message.text)

    def _dialog(self, dialog: Any) -> None:
        self.said.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def close(self) -> None:
        self.page.context.close()
