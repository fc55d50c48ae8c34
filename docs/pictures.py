"""Takes the README's pictures from real runs: ``python docs/pictures.py runs/demo docs/images``.

Needs what the package itself does not: ``pip install playwright``, and a Chromium on the PATH.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]


@contextlib.contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """A TensorBoard on a free loopback port; yields its address."""
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0"]
        process = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(300):
                log.seek(0)
                if found := re.search(r"at (http://\S+:\d+)", log.read()):
                    time.sleep(5)  # it answers before it has read the files
                    yield found[1]
                    return
                time.sleep(0.1)
            raise SystemExit("TensorBoard did not start")
        finally:
            process.terminate()
            process.wait(10)


def overview(page: Page, address: str, target: Path) -> None:
    """The time series tab with the overview's most telling cards."""
    page.goto(f"{address}/?tagFilter=gradguard/(heatmap|depth_tilt|total_norm|update_ratio)#timeseries")
    page.wait_for_selector("image-card img")
    page.get_by_role("button", name="Settings").last.click()
    page.wait_for_timeout(4000)
    page.screenshot(path=target / "overview.png")


def histograms(page: Page, address: str, target: Path) -> None:
    """Histograms of the first layer in every run."""
    page.goto(f"{address}/?tagFilter=linears.[012].weight#timeseries")
    page.wait_for_selector("histogram-card svg")
    page.get_by_role("button", name="Settings").last.click()
    page.wait_for_timeout(4000)
    page.screenshot(path=target / "histograms.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    options.target.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with tensorboard(options.runs) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        for take in (overview, histograms):
            page = browser.new_page(viewport={"width": 1280, "height": 960})
            take(page, address, options.target)
        browser.close()


if __name__ == "__main__":
    main()
