"""Shared by all tests: one thread, fixed seeds, no log folders left behind, and a browser for pages on disk."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "suite", deadline=None, max_examples=50, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _calm(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)


#: Folder for pictures of all pages that tests open; git ignores it.
PICTURES = Path(__file__).parents[1] / "test-artifacts" / "pages"

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="session")
def chromium():
    """A headless browser. Without one its tests are skipped, or fail if GRADGUARD_REQUIRE_BROWSER is 1."""
    lacks = pytest.fail if os.environ.get("GRADGUARD_REQUIRE_BROWSER") == "1" else pytest.skip
    try:
        from playwright import sync_api as api
    except ImportError:
        lacks("needs Playwright: pip install playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        except api.Error:
            lacks("needs a Chromium: make browser, or playwright install chromium")
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, request):
    """Open pages from disk. A console message, a request to the network or an error makes the test fail."""
    contexts, problems = [], []

    def open_page(path, width=1280, height=900, scheme="light"):
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on(
            "request",
            lambda request: problems.append(request.url) if request.url.startswith(("http", "ws")) else None,
        )
        page.goto(path.resolve().as_uri())
        return page

    yield open_page
    PICTURES.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "_", request.node.name).strip("_")
    for number, context in enumerate(contexts):
        for page in context.pages:
            page.screenshot(path=PICTURES / f"{name}_{number}.png", full_page=True)
        context.close()
    assert problems == []
