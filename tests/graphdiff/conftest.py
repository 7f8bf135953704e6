"""A headless Chromium for the tests of the page, started once."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no Chromium: `apt-get install chromium` (`make test` does, as root)")
    with sync_api.sync_playwright() as playwright:
        # as root, which CI is, Chromium starts only without its sandbox
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()
