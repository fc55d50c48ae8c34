"""The documentation builds without a warning, and is searched, read and clicked through from disk."""

import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

pytest.importorskip("mkdocs", reason="needs the extra docs: pip install '.[docs]'")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def search(page, word):
    """Type a word into the search box and return the addresses of what is found, best first."""
    box = page.get_by_role("textbox", name="Search")
    box.click()
    box.press_sequentially(word)
    page.wait_for_selector(".md-search-result__item", timeout=20_000)
    return [link.get_attribute("href") for link in page.locator(".md-search-result__link").all()]


@pytest.mark.parametrize(
    ("start", "word", "found"),
    [
        ("index.html", "decade", "explanation/depth-tilt.html"),
        ("how-to/clipper.html", "graceful", "how-to/policy.html"),
        ("reference/glossary.html", "SpikeClip", "reference/clippers.html"),
    ],
)
def test_the_search_works_from_disk(site, opened, start, word, found):
    addresses = search(opened(site / start), word)
    paths = [Path(unquote(urlparse(address).path)) for address in addresses]
    assert site / found in paths
    assert all(path.is_file() for path in paths)


def test_a_result_leads_to_its_page(site, opened):
    page = opened(site / "index.html")
    search(page, "hysteresis")
    page.locator(".md-search-result__link").first.click()
    page.wait_for_url("**/*.html*")
    assert "hysteresis" in page.locator("article").inner_text().lower()


def test_the_navigation_shows_the_four_kinds_of_pages(site, opened):
    page = opened(site / "index.html")
    text = page.locator("nav.md-nav--primary").inner_text()
    kinds = [text.index(kind) for kind in ("Tutorial", "How-to guides", "Reference", "Explanation")]
    assert kinds == sorted(kinds)


@pytest.mark.parametrize("width", [380, 1400])
def test_no_page_is_wider_than_its_window(site, opened, width):
    page = opened(site / "index.html", width=width)
    # The page for addresses that do not exist is for servers.
    for path in sorted(set(site.rglob("*.html")) - {site / "404.html"}):
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path.name
