"""Debian's chromium through playwright, for the page's tests; playwright itself downloads nothing."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--autoplay-policy=no-user-gesture-required",
]  # fmt: skip


def chromium_path() -> str | None:
    """Chromium on the PATH, or None."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


def chromium_or_skip() -> None:
    """Skip without Chromium, with a clear line; where ``REEL_TEST_TOOLS=required`` (CI), fail."""
    if chromium_path() is None or importlib.util.find_spec("playwright") is None:
        missing = "the page's tests need chromium on the PATH and the playwright package"
        if os.environ.get("REEL_TEST_TOOLS") == "required":
            pytest.fail(missing)
        pytest.skip(missing)


@contextmanager
def browser() -> Iterator[Any]:
    """A running headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=chromium_path(), headless=True, args=FLAGS)
        try:
            yield found
        finally:
            found.close()
