"""Make the pictures of README and documentation from real runs: ``python docs/pictures.py runs/demo docs/images``.

The first argument is the folder that ``gradguard demo`` wrote. Three further runs are trained here: a healthy one, one
whose gradients vanish, and one whose gradients explode. ``make browser`` installs the browser that takes the pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import torch
from matplotlib.figure import Figure
from playwright.sync_api import Page, sync_playwright

from lightning_gradguard import GradGuard, GradientHalt
from lightning_gradguard.cli.demo import Digits, train

#: Standard deviation of the exploding run's weights, relative to the one that keeps a signal's size.
WEIGHTS = 8.0
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
COLORS = {"exploding": "#c62828", "vanishing": "#283593", "healthy": "#2e7d32"}


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


def three_runs(folder: Path) -> dict[str, list[float]]:
    """Train one run that explodes, one that vanishes and one that is healthy, all with the default policy.

    Returns:
        log10 of gradient norm over weight norm of each layer, input first, at the last step of each run.
    """
    profiles = {}
    for name, module in {
        "1_exploding": Chaotic,
        "2_vanishing": Digits,
        "3_healthy": lambda: Digits("relu", normalize=True, residual=True),
    }.items():
        torch.manual_seed(0)
        guard, model = GradGuard(), module()
        with contextlib.suppress(GradientHalt):
            train(name, folder, model, epochs=8, guard=guard)
        assert guard.report is not None
        weights = {k: p for k, p in model.named_parameters() if p.ndim > 1}
        norms = {k: norm for k, norm in guard.report.norms.items() if k in weights}
        profiles[name[2:]] = [math.log10(norm / weights[k].norm().item()) for k, norm in norms.items()]
    return profiles


def depth_tilt(profiles: dict[str, list[float]], target: Path) -> None:
    """Draw the gradient over depth of the three runs, with the tilt of each."""
    figure = Figure(figsize=(7.5, 3.4), dpi=110, layout="constrained")
    axes = figure.subplots()
    for name, profile in profiles.items():
        pairs = combinations(range(len(profile)), 2)
        slope = statistics.median((profile[j] - profile[i]) / (j - i) for i, j in pairs)
        tilt = (len(profile) - 1) * slope
        label = f"{name}: depth tilt {tilt:.1f}".replace("-", "\N{MINUS SIGN}")
        axes.plot(profile, "o-", markersize=4, color=COLORS[name], label=label)
        print(label)
    axes.set_xticks([0, len(profile) - 1], ["first layer\n(input)", "last layer\n(output)"])
    axes.set_ylabel("log10 of gradient norm / weight norm")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(target / "depth_tilt.png")


@contextlib.contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """Run a TensorBoard on a free loopback port; yield its address."""
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
    """Take the time series tab with the most telling cards of the overview."""
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
    """Take the histograms of the first layer in every run."""
    page.goto(f"{address}/?tagFilter=linears.[012].weight#timeseries")
    page.wait_for_selector("histogram-card svg")
    page.get_by_role("button", name="Settings").last.click()
    page.wait_for_timeout(4000)
    page.screenshot(path=target / "histograms.png")


def diagnosis(page: Page, address: str, target: Path) -> None:
    """Take the upper part of the page that the demo's first act writes."""
    page.goto(address)
    page.screenshot(
        path=target / "diagnosis.png", clip={"x": 0, "y": 0, "width": 1000, "height": 1690}, full_page=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    options.target.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        depth_tilt(three_runs(Path(folder)), options.target)
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        for runs, takes, size in (
            (Path(folder), (three,), {"width": 1500, "height": 560}),
            (options.runs, (overview, histograms), {"width": 1280, "height": 960}),
        ):
            with tensorboard(runs) as address:
                for take in takes:
                    take(browser.new_page(viewport=size), address, options.target)
        written = (options.runs / "diagnosis.html").resolve().as_uri()
        diagnosis(browser.new_page(viewport={"width": 1000, "height": 900}), written, options.target)
        browser.close()


if __name__ == "__main__":
    main()
