"""Take the README's pictures from real runs: ``python docs/pictures.py runs/demo docs/images``.

The first argument is the folder that ``gradguard demo`` wrote. Three more runs are trained here: one is healthy, in one
gradients vanish, in one they explode. Needs Playwright, ``pip install playwright``, and a Chromium on the PATH.
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

import torch
from playwright.sync_api import Page, sync_playwright

from lightning_gradguard import GradGuard, GradientHalt
from lightning_gradguard.cli.demo import Digits, train

#: Standard deviation of the exploding run's weights, relative to the one that keeps the size of a signal.
WEIGHTS = 8.0
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]


class Chaotic(Digits):
    """Twelve tanh layers with weights eight times too large: gradients grow towards the input."""

    def __init__(self) -> None:
        super().__init__()
        for linear in self.linears:
            torch.nn.init.normal_(linear.weight, std=WEIGHTS / linear.in_features**0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        h = images
        for linear in self.linears:
            h = torch.tanh(linear(h))
        scores: torch.Tensor = self.head(h)
        return scores

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.001)


def three_runs(folder: Path) -> None:
    """Train an exploding, a vanishing and a healthy run, without a clipper, each as far as it gets."""
    for name, module in {
        "1_exploding": Chaotic,
        "2_vanishing": Digits,
        "3_healthy": lambda: Digits("ReLU in residual blocks with normalization"),
    }.items():
        torch.manual_seed(0)
        with contextlib.suppress(GradientHalt):
            train(name, folder, module(), epochs=8, guard=GradGuard())


@contextlib.contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """Start a TensorBoard on a free loopback port; yield its address."""
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
    """Take the time series tab with the most important cards of the overview."""
    page.goto(f"{address}/?tagFilter=gradguard/(heatmap|depth_tilt|total_norm|update_ratio)#timeseries")
    page.wait_for_selector("image-card img")
    page.get_by_role("button", name="Settings").last.click()
    page.wait_for_timeout(4000)
    page.screenshot(path=target / "overview.png")


def three(page: Page, address: str, target: Path) -> None:
    """Take the heat maps of three runs side by side."""
    page.goto(f"{address}/?tagFilter=gradguard/heatmap#timeseries")
    page.wait_for_selector("image-card img")
    page.get_by_role("button", name="Settings").last.click()
    page.wait_for_timeout(4000)
    page.screenshot(path=target / "three.png")


def histograms(page: Page, address: str, target: Path) -> None:
    """Take the histograms of the first layers in every run."""
    page.goto(f"{address}/?tagFilter=linears.[012].weight#timeseries")
    page.wait_for_selector("histogram-card svg")
    page.get_by_role("button", name="Settings").last.click()
    page.wait_for_timeout(4000)
    page.screenshot(path=target / "histograms.png")


def diagnosis(page: Page, address: str, target: Path) -> None:
    """Take the diagnosis page of the demo's first run, down to the pictures of the fixes."""
    page.goto(address)
    page.screenshot(
        path=target / "diagnosis.png", clip={"x": 0, "y": 0, "width": 1000, "height": 1540}, full_page=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    options.target.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        three_runs(Path(folder))
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        for runs, takes, size in (
            (Path(folder), (three,), {"width": 1500, "height": 560}),
            (options.runs, (overview, histograms), {"width": 1280, "height": 960}),
        ):
            with tensorboard(runs) as address:
                for take in takes:
                    take(browser.new_page(viewport=size), address, options.target)
        address = (options.runs / "diagnosis.html").resolve().as_uri()
        diagnosis(browser.new_page(viewport={"width": 1000, "height": 900}), address, options.target)
        browser.close()


if __name__ == "__main__":
    main()
